"""Test recipes of instructions: the rows that the sources become."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_recipes.made import Made

from avllm.data.manifest import read_manifest
from avllm.data.schema import Sample
from avllm.recipes.frame import RecipeError, make
from data_recipes import avinstruct, avsd, sharegpt, sources_instructions, video_chatgpt, videochat

Run = Callable[..., Made]


@pytest.fixture
def made(tmp_path: Path) -> Run:
    return lambda recipe, **options: Made(recipe, sources_instructions, tmp_path, **options)


def words_of(part: Any) -> str:
    return part.text if part.type == "text" else f"<{Path(part.path).name}>"


def said(sample: Sample) -> list[list[str]]:
    """Return the words of each turn, with file names without folders in angle brackets."""
    return [[words_of(part) for part in message.content] for message in sample.messages]


def test_sharegpt_puts_pictures_where_their_placeholders_are(made: Run) -> None:
    rows = made(sharegpt).rows()
    assert [said(row) for row in rows] == [
        [
            ["<000000033471.jpg>", "What are the colors of the bus?"],
            ["White and red."],
            ["And the sky?"],
            ["Blue."],
        ],
        [["Describe the scene.", "<000000033471.jpg>"], ["A bus waits in front of a shop."]],
        [["Who wrote Faust?"], ["Goethe."]],
    ]
    assert [row.id for row in rows] == [
        f"llava_instruct_150k-{name}" for name in ("000000033471", "000000033471~2", "7")
    ]


def test_sharegpt_says_why_it_drops(made: Run) -> None:
    assert made(sharegpt).dropped == [
        ("placeholder_mismatch", "llava_instruct_150k.json[3]"),
        ("placeholder_mismatch", "llava_instruct_150k.json[4]"),
        ("starts_without_question", "llava_instruct_150k.json[5]"),
        ("ends_without_answer", "llava_instruct_150k.json[6]"),
    ]


def test_sharegpt_can_begin_with_the_first_question(made: Run) -> None:
    row = made(sharegpt, from_first_question=True).rows()[-1]
    assert said(row) == [["Why?"], ["Because."]]
    assert row.meta == {"turns_left_out": 1}


def test_sharegpt_takes_the_named_file_and_asks_for_it_where_there_are_several(
    tmp_path: Path,
) -> None:
    assert len(Made(sharegpt, sources_instructions, tmp_path, file="detail_23k.json").rows()) == 1
    source = tmp_path / "source"
    (source / "llava_instruct_150k.json").rename(source / "other.json")
    with pytest.raises(RecipeError, match=r"detail_23k\.json, other\.json") as caught:
        make(sharegpt.ABOUT, sharegpt.rows, source, tmp_path / "again")
    assert caught.value.reason == "no_single_file"


def test_sharegpt_knows_the_licence_of_llavas_own_files_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("avllm"), "propagate", True)
    run = Made(sharegpt, sources_instructions, tmp_path)
    assert {row.licence for row in run.rows()} == {sharegpt.LICENCE}
    assert not caplog.messages
    (run.source / sharegpt.WHOLE).rename(run.source / "other.json")
    for number, (options, licence) in enumerate(
        (({"file": "detail_23k.json"}, sharegpt.LICENCE), ({}, None), ({"licence": "MIT"}, "MIT"))
    ):
        output = tmp_path / f"again{number}"
        make(sharegpt.ABOUT, sharegpt.rows, run.source, output, **{"file": "other.json", **options})
        assert {row.licence for row in read_manifest(output / "train.jsonl")} == {licence}
    assert set(caplog.messages) == {
        "no licence is known of other.json: its rows get none; name it with --licence"
    }


def test_sharegpt_reads_the_form_of_openai_with_video_and_audio(tmp_path: Path) -> None:
    source = tmp_path / "mine"
    source.mkdir()
    content = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<video>What is heard here, <audio> and seen there?"},
        {"role": "assistant", "content": "A dog."},
    ]
    row = {"messages": content, "videos": ["clip"], "audios": "sounds/dog.wav"}
    (source / "train.jsonl").write_text(json.dumps(row) + "\n\n", encoding="utf-8")
    (source / "media/sounds").mkdir(parents=True)
    for name in ("clip.webm", "sounds/dog.wav"):
        (source / "media" / name).write_bytes(b"x")
    make(sharegpt.ABOUT, sharegpt.rows, source, tmp_path / "out", media="media")
    (sample,) = read_manifest(tmp_path / "out/train.jsonl")
    asked = ["<clip.webm>", "What is heard here, ", "<dog.wav>", " and seen there?"]
    assert said(sample) == [["Be brief."], asked, ["A dog."]]
    assert [part.type for part in sample.media] == ["video", "audio"]
    assert sample.id == "train-train.jsonl:1"


def test_videochat_asks_by_question_or_instruction(made: Run) -> None:
    run = made(videochat)
    assert [said(row) for row in run.rows()] == [
        [
            ["<1066653121.mp4>", "What is the man doing?"],
            ["He surfs."],
            ["Where?"],
            ["On a big wave."],
        ],
        [["<11671436.mp4>", "Describe the video in detail."], ["Two dogs run over a lawn."]],
    ]
    assert run.dropped == [("empty_answer", "videochat_instruct_11k.json[2]")]


def test_videochat_as_videochat2_has_it_tells_an_instruction_once(tmp_path: Path) -> None:
    source = tmp_path / "source"
    sources_instructions.videochat2(source)
    make(videochat.ABOUT, videochat.rows, source, tmp_path / "out")
    described, asked = read_manifest(tmp_path / "out/train.jsonl")
    assert said(described) == [
        ["<11671436.mp4>", "Describe the clip in detail."],
        ["Two dogs run over a lawn."],
    ]
    first = ["<1066653121.mp4>", "Answer briefly.\nWhat is it?"]
    assert said(asked) == [first, ["A man."], ["Where?"], ["Here."]]
    assert (asked.media[0].start, asked.media[0].end) == (1.5, 4.0)


def test_video_chatgpt_finds_files_by_their_ids_and_numbers_the_questions(made: Run) -> None:
    run = made(video_chatgpt)
    assert [(row.id, Path(row.media[0].path).name) for row in run.rows()] == [
        ("video-chatgpt-v_k_ZXmr8pmrs-0", "v_k_ZXmr8pmrs.mp4"),
        ("video-chatgpt-v_k_ZXmr8pmrs-1", "v_k_ZXmr8pmrs.mp4"),
        ("video-chatgpt-v_-PFGmr8pmrs-0", "v_-PFGmr8pmrs.mkv"),
    ]
    assert run.dropped == [("empty_question", "VideoInstruct_Dataset.json[3]")]
    assert run.report.numbered_ids == 0


def test_avsd_takes_the_labelled_test_set(made: Run) -> None:
    run = made(avsd)
    assert said(run.rows()[0]) == [
        ["<YSE1G.mp4>", "question 0 ?"],
        ["only one person ."],
        ["question 1 ?"],
        ["yes"],
    ]
    assert [row.answer for row in run.rows("validation")] == ["yes , there is ."]
    assert [row.answer for row in run.rows("test")] == ["he is looking outside ."]
    assert run.dropped == [("undisclosed_answer", "lbl_test_set4DSTC7-AVSD.json[1]")]


def test_avsd_without_the_labelled_test_set_drops_what_is_not_told(
    made: Run, tmp_path: Path
) -> None:
    run = made(avsd)
    (run.source / "lbl_test_set4DSTC7-AVSD.json").unlink()
    report = make(avsd.ABOUT, avsd.rows, run.source, tmp_path / "again")
    assert (dict(report.rows), dict(report.dropped)) == (
        {"train": 1, "validation": 1},
        {"undisclosed_answer": 2},
    )


def test_avsd_tells_the_caption_when_asked_to(made: Run) -> None:
    assert (
        made(avsd, caption=True).rows()[0].messages[0].text == "a person walked in .\nquestion 0 ?"
    )


def test_avinstruct_takes_the_marks_out_and_uses_the_videos_own_sound(made: Run) -> None:
    run = made(avinstruct)
    asked = "Summarize the video to help answer:\nHow many instruments are sounding in the video?"
    assert [said(row) for row in run.rows()] == [
        [[asked, "<00005580.mp4>"], ["Two: the violin and the cello."]],
        [["What happened in the video?", "<-HG3Omg_89c_30.mp4>"], ["A yacht passes."]],
    ]
    assert run.dropped == [("placeholder_mismatch", "avqa_data2.json[1]")]


def test_a_row_of_another_form_is_a_drop_that_says_what_was_seen(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    sources_instructions.videochat(source)
    path = source / "videochat_instruct_11k.json"
    good = json.loads(path.read_text(encoding="utf-8"))[:1]
    bad = [
        {"video": "a/1.mp4"},
        {"video": "a/1.mp4", "QA": ["What?"]},
        {"video": "a/1.mp4", "QA": []},
    ]
    path.write_text(json.dumps(good + bad), encoding="utf-8")
    make(videochat.ABOUT, videochat.rows, source, tmp_path / "out")
    lines = [
        json.loads(line)
        for line in (tmp_path / "out/dropped.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [line["reason"] for line in lines] == ["malformed_row", "malformed_row", "no_turns"]
    assert "no field 'QA'; the row has video" in lines[0]["detail"]
    assert "What?; expected texts in i, q, a" in lines[1]["detail"]
