"""Check the findings of `avllm data check` about rows and files, and `avllm data show`."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data.check.checked_rows import about, reasons, reasons_of, words
from data.check.odd_work import OddReader, square
from data.media import media_files
from PIL import Image
from tiny import World, make_world, write_clip, write_rows
from typer.testing import CliRunner

from avllm.cli.main import app
from avllm.config_model import ModelConfig
from avllm.data.check import file as check_file
from avllm.data.check import files as check_files
from avllm.data.check.file import examine
from avllm.data.check.files import CheckError, ExamineOptions
from avllm.data.check.reasons import REASONS
from avllm.data.check.run import check
from avllm.data.check.stats import stats
from avllm.data.check.uses import FileJob, PlainReader, Use
from avllm.data.check.workers import Lost, run_guarded
from avllm.data.items import read_quarantine
from avllm.data.media.load import REASONS as MEDIA_REASONS
from avllm.data.media.whole import WholeFile
from avllm.data.reading import MediaReader
from avllm.data.row import IGNORE, Row
from avllm.data.schema import RowError, Sample
from avllm.inference.drawing import sheet
from avllm.inference.row_tokens import ProcessorTokens, TextTokens, reading
from avllm.inference.shown import check_row, show
from avllm.models.building.described import described_processor
from avllm.models.processing_avllm import AVProcessor

LONG_ANSWER = "a man walks a dog along the river"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), clips=2)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", (200, 30, 30), 400.0)


@pytest.fixture(scope="module")
def processor(world: World) -> AVProcessor:
    return described_processor(ModelConfig.model_validate(world.model))


# ---- workers ------------------------------------------------------------------------------------


def test_a_lost_worker_costs_only_its_task() -> None:
    limits = dict.fromkeys(range(8), 30.0) | {4: 0.5}
    results = dict(run_guarded(square, range(8), workers=2, seconds=limits.__getitem__))
    lost = {n: results.pop(n) for n in (3, 4, 5)}
    assert results == {n: n * n for n in (0, 1, 2, 6, 7)}
    assert all(isinstance(value, Lost) for value in lost.values())
    assert {n: value.reason for n, value in lost.items()} == {
        3: "crashed",
        4: "timeout",
        5: "crashed",
    }
    assert "SIGSEGV" in lost[3].detail
    assert list(run_guarded(square, [], workers=2, seconds=lambda n: 1.0)) == []


def test_files_that_hang_or_kill_are_named(
    clip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(check_files, "OVERHEAD_SECONDS", 1.0)
    names = ["hangs.mp4", "kills.mp4", "late.mp4", "good.mp4"]
    for name in names:
        shutil.copy(clip, tmp_path / name)
    manifest = write_rows(tmp_path / "m.jsonl", [about(tmp_path / n, n) for n in names])
    report = check(
        [manifest],
        options=ExamineOptions(reader=OddReader(), workers=1),
        output=tmp_path / "out",
    )
    assert (tmp_path / "out/quarantine.txt").read_text() == (
        "hangs.mp4\ttimeout\nkills.mp4\tcrashed\nlate.mp4\ttimeout\n"
    )
    assert "SIGSEGV" in report.examples["crashed"][0].detail
    journal = [
        json.loads(line) for line in (tmp_path / "out/journal.jsonl").read_text().splitlines()
    ]
    results = [Path(entry["path"]).name for entry in journal if " " not in entry["key"]]
    assert results == ["good.mp4"], "the other entries are hashes and thumbnails"


# ---- rows ---------------------------------------------------------------------------------------


def test_rows_have_their_reasons(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        words("good"),
        words("twice"),
        words("twice"),
        words("no answer", "  "),
        words("nothing asked", question=" "),
        words("long", "na " * 10_000),
        words("placeholder", question="<video>\nwhat ?"),
        words("other placeholder", question="<ImageHere> what ?"),
        {**words("no licence"), "licence": None},
        words("tab\tid"),
        {**words("odd field"), "colour": "red"},
    ]
    first = write_rows(tmp_path / "first.jsonl", rows)
    with first.open("a") as file:
        file.write("{no json\n\n")
    second = write_rows(tmp_path / "second.jsonl", [words("good", source="elsewhere")])
    assert "no_licence" not in check([first, second]).to_dict()["reasons"]
    report = check([first, second], output=tmp_path / "out", licences=True)
    assert reasons(report) == {
        "good": {"id_in_two_manifests"},
        "twice": {"duplicate_id"},
        "no answer": {"empty_answer"},
        "nothing asked": {"empty_text"},
        "long": {"long_text"},
        "placeholder": {"placeholder"},
        "other placeholder": {"placeholder"},
        "no licence": {"no_licence"},
        "tab\tid": {"unlisted_id"},
        "odd field": {"malformed"},
        "": {"malformed"},
    }
    quarantined = read_quarantine([tmp_path / "out/quarantine.txt"])
    assert quarantined.keys() == {"no answer"}  # the rest is what training takes
    assert report.to_fix == {str(first): [3, 10, 11, 12]}
    (sentence,) = report.advice()
    assert f"{first} lines 3, 10, 11, 12" in sentence
    assert report.rows == {str(first): 12, str(second): 1}
    assert sum(c["rows"] for c in report.sources.values()) == 13
    without_id = [finding.line for finding in report.examples["malformed"] if finding.id == ""]
    assert without_id == [12]


def test_an_id_is_compared_within_its_manifest_and_with_the_others(tmp_path: Path) -> None:
    names = ("first", "second", "third")
    first, second, third = (tmp_path / f"{name}.jsonl" for name in names)
    write_rows(first, [words("a"), words("b"), words("only")])
    write_rows(second, [words("a"), words("b"), words("a")])
    write_rows(third, [words("a"), words("c")])
    report = check([first, second, third])
    places = {
        reason: [(Path(f.manifest).stem, f.line) for f in findings]
        for reason, findings in report.examples.items()
    }
    assert places == {
        "id_in_two_manifests": [("second", 1), ("second", 2), ("second", 3), ("third", 1)],
        "duplicate_id": [("second", 3)],
    }
    last = report.examples["id_in_two_manifests"][-1].detail
    assert str(first) in last
    assert str(second) in last
    assert report.to_fix == {str(second): [3]}


def test_an_id_of_several_manifests_is_listed_once_and_only_when_all_its_rows_are_bad(
    tmp_path: Path,
) -> None:
    paths = [tmp_path / f"{name}.jsonl" for name in "abc"]
    gone = [about(tmp_path / "gone.mp4", "bad"), words("bad", " "), words("bad", " ")]
    for number, path in enumerate(paths):
        once = words("once", " " if number == 1 else "red")
        write_rows(path, [words(f"own {number}", " "), gone[number], once])
    report = check(paths, output=tmp_path / "out")
    assert (tmp_path / "out/quarantine.txt").read_text().splitlines() == [
        "own 0\tempty_answer",
        "own 1\tempty_answer",
        "own 2\tempty_answer",
        "bad\tmissing,empty_answer",
    ]
    assert report.to_fix == {str(paths[1]): [3]}, "training takes the other two rows of this id"


@pytest.mark.parametrize(
    ("answer", "further", "choices", "right"),
    [
        ("red", None, ["red", "blue"], True),
        ("Red.", ["blue"], ["red", "blue"], True),
        ("It is a red one", None, ["red", "blue"], True),
        ("B", None, ["red", "blue"], True),
        ("(b) blue", None, ["red", "blue"], True),
        ("blue", None, ["A. red", "B. blue"], True),
        ("green", None, ["red", "blue"], False),
        ("red", ["green"], ["red", "blue"], False),
        ("C", None, ["red", "blue"], False),
        ("redder", None, ["red", "blue"], False),
        ("red", None, [], True),
        ("?", None, ["?", "!"], True),
    ],
)
def test_answers_outside_the_choices_are_found(
    answer: str, further: list[str] | None, choices: list[str], right: bool, tmp_path: Path
) -> None:
    row = words("a", answer, choices=choices, answers=further)
    report = check([write_rows(tmp_path / "m.jsonl", [row])], output=tmp_path / "out")
    assert reasons(report) == ({} if right else {"a": {"answer_outside_choices"}})
    assert (tmp_path / "out/quarantine.txt").read_text() == "", "training takes it"


def test_the_quarantine_list_holds_ids_without_tabs_and_line_breaks(tmp_path: Path) -> None:
    rows = [words("line\rid", " "), {**words("tab\tid"), "colour": "red"}, words("empty", " ")]
    report = check([write_rows(tmp_path / "m.jsonl", rows)], output=tmp_path / "out")
    assert reasons(report)["line\rid"] == {"unlisted_id", "empty_answer"}
    assert read_quarantine([tmp_path / "out/quarantine.txt"]) == {"empty": "empty_answer"}
    assert list(report.to_fix.values()) == [[1, 2]]


def test_test_rows_in_training_are_found(clip: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.mp4"
    shutil.copy(clip, copy)
    other = write_clip(tmp_path / "other.mp4", (0, 0, 255), 400.0)
    test = [about(clip, "t0", LONG_ANSWER), words("same", source="a")]
    rows = [
        about(copy, "bytes"),
        about(clip, "file"),
        about(other, "caption", LONG_ANSWER.upper() + "!"),
        words("same", source="a"),
        about(other, "t0", source="b"),
        words("short"),
    ]
    manifest = write_rows(tmp_path / "m.jsonl", rows)
    against = write_rows(tmp_path / "t.jsonl", test)
    report = check([manifest], against=[against])
    assert reasons(report) == {
        "bytes": {"test_media"},
        "file": {"test_media", "duplicate_media"},
        "caption": {"test_caption"},
        "same": {"test_id"},
        "t0": {"same_id_as_test"},
    }
    assert report.count("error") == 3


def test_duplicate_media_are_found_by_their_bytes(clip: Path, tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        shutil.copy(clip, tmp_path / name)
    changed = bytearray(clip.read_bytes())
    changed[-1] ^= 1  # as long, and another file
    (tmp_path / "c.mp4").write_bytes(changed)
    rows = [about(Path(name), name[0], licence="x") for name in ("a.mp4", "b.mp4", "c.mp4")]
    report = check([write_rows(tmp_path / "m.jsonl", rows)])
    assert reasons(report) == {"b": {"duplicate_media"}}


# ---- files --------------------------------------------------------------------------------------


def test_an_interrupted_check_continues(clip: Path, tmp_path: Path) -> None:
    names = ["a.mp4", "b.mp4", "c.mp4"]
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(clip.read_bytes() + bytes(number))
    manifest = write_rows(tmp_path / "m.jsonl", [about(Path(name), name) for name in names])
    out = tmp_path / "out"
    first = check([manifest], output=out)
    report = (out / "findings.jsonl").read_bytes()
    journal = out / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])  # killed while it wrote the last line
    again = check([manifest], output=out)
    assert (first.reused, again.reused, again.files) == (0, 2, 3)
    assert (out / "findings.jsonl").read_bytes() == report
    assert check([manifest], output=out).reused == 3
    (tmp_path / "b.mp4").write_bytes(b"")
    changed = check([manifest], output=out)
    assert changed.reused == 2
    assert reasons(changed) == {"b.mp4": {"zero_byte"}}
    assert check([manifest], options=ExamineOptions("full"), output=out).reused == 0


def test_a_longer_timeout_and_known_hashes_examine_nothing_again(
    clip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(clip.read_bytes())
    manifest = write_rows(
        tmp_path / "m.jsonl",
        [about(Path(name), name) for name in ("a.mp4", "b.mp4")],
    )
    first = check(
        [manifest],
        options=ExamineOptions(reader=PlainReader(timeout=60.0)),
        output=tmp_path / "out",
    )
    monkeypatch.setattr(check_files, "content_hash", None)  # would read the files
    again = check(
        [manifest],
        options=ExamineOptions(reader=PlainReader(timeout=120.0)),
        output=tmp_path / "out",
    )
    assert (first.reused, again.reused) == (0, 2)
    assert reasons(first) == reasons(again) == {"b.mp4": {"duplicate_media"}}
    monkeypatch.undo()
    (tmp_path / "b.mp4").write_bytes(clip.read_bytes()[:-1] + b"x")
    assert reasons(check([manifest], output=tmp_path / "out")) == {}


def test_a_damaged_journal_is_named(clip: Path, tmp_path: Path) -> None:
    manifest = write_rows(tmp_path / "m.jsonl", [about(clip, "a")])
    check([manifest], output=tmp_path / "out")
    journal = tmp_path / "out" / "journal.jsonl"
    for line in (b'{"path": "a.mp4" "key"}\n', b"[1]\n", b"{}\n", b"\xff\n"):
        journal.write_bytes(journal.read_bytes() + line)
        with pytest.raises(CheckError, match=r"journal.jsonl line 2") as raised:
            check([manifest], output=tmp_path / "out")
        assert raised.value.reason == "damaged_row"
        journal.write_bytes(journal.read_bytes()[: -len(line)])


def test_headers_and_decoding_find_the_same_late_and_short_sound(tmp_path: Path) -> None:
    late = media_files.write_clip(
        tmp_path / "late.mkv",
        seconds=4,
        sound=media_files.clicks(1, 48_000, [0.5]),
        sound_start=1.5,
    )
    uses = (
        Use("video"),
        Use("video", start=1.0),
        Use("video", start=3.0),
        Use("video", end=1.0),
        Use("video", sound="off"),
    )
    for decode in ("headers", "sample"):
        results = examine(PlainReader(), decode, FileJob(str(late), uses))["uses"]
        frames = [use["frames"] for use in results]
        assert frames == [100, 75, 25, 25, 100], "of the clip, not those that are read"
        both = ["late_sound", "short_sound"]
        assert [reasons_of(use) for use in results] == [both, both, [], [], []]


def test_headers_alone_and_whole_files(clip: Path, tmp_path: Path) -> None:
    mute = write_clip(tmp_path / "mute.mp4", (0, 200, 0), None)
    uses = (
        Use("video"),
        Use("audio"),
        Use("video", sound="on"),
        Use("video", start=5.0),
        Use("video", end=9.0),
        Use("video", sound="off"),
    )
    by_headers = examine(PlainReader(), "headers", FileJob(str(mute), uses))["uses"]
    assert [reasons_of(use) for use in by_headers] == [
        ["no_sound_track"],
        ["no_audio"],
        ["no_audio"],
        ["empty_interval"],
        ["no_sound_track", "past_end"],
        [],
    ]
    assert "frames" not in by_headers[1], "a sound has none"
    decoded = examine(PlainReader(), "sample", FileJob(str(mute), uses))["uses"]
    for use, other in zip(decoded, by_headers, strict=True):
        assert set(reasons_of(use)) == set(reasons_of(other))
    data = bytearray(clip.read_bytes())
    at = data.find(b"mdat")
    last = len(data) - (len(data) - at) // 3
    assert examine(PlainReader(), "full", FileJob(str(clip), (Use("video"),)))["problems"] == []
    data[last : last + 400] = np.random.default_rng(0).bytes(400)
    (tmp_path / "spoilt.mp4").write_bytes(data)
    spoilt = examine(PlainReader(), "full", FileJob(str(tmp_path / "spoilt.mp4"), (Use("video"),)))
    spoilt_reasons = reasons_of(spoilt) + reasons_of(spoilt["uses"][0])
    assert set(spoilt_reasons) & {"damaged", "undecodable"}


def test_a_file_with_a_warning_is_still_decoded_whole(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mute = write_clip(tmp_path / "mute.mp4", (0, 200, 0), None)
    monkeypatch.setattr(check_file, "decode_whole", lambda path, timeout: WholeFile(8, 0.0, 100, 1))
    result = examine(PlainReader(), "full", FileJob(str(mute), (Use("video"),)))
    assert reasons_of(result) == ["damaged"]
    assert re.findall(r"\d+", result["problems"][0].detail) == ["1", "100"]


def test_a_video_without_a_sound_track_is_named_and_not_in_quarantine(tmp_path: Path) -> None:
    mute = write_clip(tmp_path / "mute.mp4", (0, 200, 0), None)
    report = check(
        [write_rows(tmp_path / "m.jsonl", [about(mute, "mute")])],
        output=tmp_path / "out",
    )
    assert reasons(report) == {"mute": {"no_sound_track"}}
    assert (report.count("warning"), report.count("error")) == (1, 0)
    assert (tmp_path / "out/quarantine.txt").read_text() == ""


def test_a_picture_with_a_second_one_in_its_file_is_a_jpeg(tmp_path: Path) -> None:
    picture = Image.new("RGB", (32, 32), "red")
    picture.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[picture])
    assert (
        examine(PlainReader(), "sample", FileJob(str(tmp_path / "a.jpg"), (Use("image"),)))[
            "problems"
        ]
        == []
    )


def test_files_in_shards_are_checked_like_others(clip: Path, tmp_path: Path) -> None:
    data = clip.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    (tmp_path / "film.avi").write_bytes(data)
    (tmp_path / "film.mp4").write_bytes(data)
    rows = [
        about(tmp_path / "film.mp4", "good"),
        about(tmp_path / "cut.mp4", "cut"),
        about(tmp_path / "film.avi", "named"),
    ]
    manifest = write_rows(tmp_path / "m.jsonl", rows)
    assert (
        CliRunner()
        .invoke(app, ["data", "pack", str(manifest), "--output", str(tmp_path / "p")])
        .exit_code
        == 0
    )
    alone = check([manifest])
    packed = check([tmp_path / "p/m.jsonl"], output=tmp_path / "out")
    assert reasons(packed) == reasons(alone)
    assert reasons(packed) == {
        "cut": {"truncated"},
        "named": {"wrong_extension", "duplicate_media"},
    }
    assert check([tmp_path / "p/m.jsonl"], output=tmp_path / "out").reused == 3


def test_every_reason_is_in_the_list() -> None:
    assert set(MEDIA_REASONS) <= REASONS.keys()
    assert {
        "too_long",
        "empty_answer",
        "reserved_text",
        "no_encoder",
        "no_answer",
    } <= REASONS.keys()
    assert all(REASONS[r].severity == "error" for r in MEDIA_REASONS)


def test_the_page_is_self_contained(clip: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.mp4").write_bytes(clip.read_bytes()[:300])
    rows = [
        about(clip, "<b>odd</b>", licence=None),
        about(tmp_path / "cut.mp4", "cut"),
        words("words"),
    ]
    check([write_rows(tmp_path / "m.jsonl", rows)], output=tmp_path / "out", licences=True)
    page = (tmp_path / "out/check.html").read_text()
    assert not re.search(r"(src|href)=.?https?:", page)
    assert "<b>odd</b>" not in page
    assert "&lt;b&gt;odd" in page
    assert page.count("<svg") == 3  # seconds, frames, sound level
    content = json.loads((tmp_path / "out/check.json").read_text())
    assert content["rows_with_errors"] == 1
    assert content["reasons"]["no_licence"] == {"severity": "warning", "rows": 1}


# ---- tokens -------------------------------------------------------------------------------------


def test_tokens_are_counted_as_in_training(
    processor: AVProcessor,
    clip: Path,
    tmp_path: Path,
) -> None:
    sample = Sample.model_validate(about(clip, "short"))
    seen = examine(processor, "sample", FileJob(str(clip), (Use.of(sample.media[0]),)))["uses"]
    trained = processor.row(sample, MediaReader(processor).inputs(sample.media, None))
    count = ProcessorTokens(processor)
    assert count(sample, [seen[0]["tokens"]], [seen[0]["seconds"]]) == len(trained.input_ids)
    with pytest.raises(RowError) as too_long:
        count(sample, [{"video": 2048}], [1.0])
    assert too_long.value.reason == "too_long"
    with pytest.raises(RowError) as empty:
        count(Sample.model_validate(words("empty", " ")), [], [])
    assert empty.value.reason == "empty_answer"
    rows = [words("short"), words("long", "red " * 30)]
    report = check(
        [write_rows(tmp_path / "m.jsonl", rows)],
        tokens=TextTokens(processor.tokenizer, 20),
    )
    assert reasons(report) == {"long": {"too_long"}}
    assert list(report.values["tokens"]) == [3]


def test_times_in_shares_of_a_clip_are_no_error(world: World, clip: Path, tmp_path: Path) -> None:
    percent = described_processor(
        ModelConfig.model_validate({**world.model, "time_codec": {"type": "percent"}})
    )
    row = about(clip, "timed")
    row["messages"][-1]["content"] = [{"type": "time", "seconds": 0.5}]
    manifest = write_rows(tmp_path / "m.jsonl", [row])
    options = ExamineOptions("sample", percent, reading(percent), 1)
    report = check([manifest], options=options, tokens=ProcessorTokens(percent))
    assert reasons(report) == {}
    assert stats([manifest], options=options, tokens=ProcessorTokens(percent)).total.refused == 0


def test_times_and_reasons_of_outside_parts_are_findings(
    processor: AVProcessor, clip: Path, tmp_path: Path
) -> None:
    late = about(clip, "late")
    late["messages"][-1]["content"] = [{"type": "time", "seconds": 99.0}]
    manifest = write_rows(tmp_path / "m.jsonl", [late])
    options = ExamineOptions("sample", processor, reading(processor), 1)
    report = check([manifest], options=options, tokens=ProcessorTokens(processor))
    assert reasons(report) == {"late": {"outside_clip"}}

    class OwnTokens(TextTokens):
        def __call__(self, *row: Any) -> int:
            raise RowError("too_green", "a green row")

    manifest = write_rows(tmp_path / "own.jsonl", [words("green")])
    report = check([manifest], tokens=OwnTokens(processor.tokenizer, 20))
    assert reasons(report) == {"green": {"unexpected"}}
    assert "too_green" in report.examples["unexpected"][0].detail


def test_reasons_that_rows_are_refused_for_are_in_the_list() -> None:
    package = Path(check_file.__file__).parents[2]
    reasons_in_code: set[str] = set()
    for folder in ("models/rows", "time_codecs"):
        for file in sorted((package / folder).glob("*.py")):
            reasons_in_code.update(re.findall(r'(?:Row|Time)Error\(\s*"(\w+)"', file.read_text()))
    assert {"outside_clip", "no_clip", "region_cropped"} <= reasons_in_code
    assert reasons_in_code <= REASONS.keys()


def test_rows_of_which_none_can_be_counted(processor: AVProcessor, tmp_path: Path) -> None:
    manifest = write_rows(tmp_path / "m.jsonl", [words("long", "red " * 30)])
    report = check([manifest], tokens=TextTokens(processor.tokenizer, 20), output=tmp_path / "out")
    assert reasons(report) == {"long": {"too_long"}}
    assert json.loads((tmp_path / "out/check.json").read_text())["summary"] == {}


def test_the_journal_knows_how_files_were_read(world: World, processor: AVProcessor) -> None:
    more = described_processor(
        ModelConfig.model_validate({**world.model, "sampling": {"num_frames": 3}}),
    )
    assert reading(processor) == reading(
        described_processor(ModelConfig.model_validate(world.model)),
    )
    assert reading(processor) != reading(more)


def test_a_model_without_ears_names_rows_with_sound(world: World, clip: Path) -> None:
    blind = {**world.model, "encoders": {"video": world.model["encoders"]["video"]}}
    deaf = described_processor(
        ModelConfig.model_validate({**blind, "connector": [{"type": "mlp", "stream": "video"}]}),
    )
    uses = examine(deaf, "sample", FileJob(str(clip), (Use("audio"), Use("video"))))["uses"]
    assert [reasons_of(use) for use in uses] == [["no_encoder"], []]
    assert uses[1]["tokens"] == {"video": 32}


# ---- show ---------------------------------------------------------------------------------------


def test_a_row_is_shown_as_the_model_gets_it(processor: AVProcessor, clip: Path) -> None:
    sample = Sample.model_validate(about(clip, "a", "red"))
    shown = show(processor, sample, None)
    kinds = [piece.kind for piece in shown.pieces]
    assert kinds == ["text", "media", "text", "trained"]
    assert (
        shown.pieces[1].text == "⟨50 audio + 32 video⟩"
        or shown.pieces[1].text == "⟨32 video + 50 audio⟩"
    )
    assert shown.pieces[3].text.startswith("red")
    assert sum(piece.tokens for piece in shown.pieces) == len(shown.row.input_ids)
    assert shown.media[0].frames is not None
    assert any(span.style == "bold green" for span in shown.text.spans)


def test_frames_lie_side_by_side_above_their_seconds() -> None:
    frames = torch.arange(12, dtype=torch.uint8)[:, None, None, None].expand(
        12,
        40,
        60,
        3,
    )  # (T, H, W, 3)
    seen = np.asarray(sheet(frames))
    assert seen.shape == (2 * 80, 10 * 120, 3), "enlarged to twice the size, ten in a row"
    assert [int(seen[79, 120 * n][0]) for n in range(10)] == list(range(10))
    assert (seen[80:, :240].reshape(80, 2, 120, 3) == np.array([10, 11])[:, None, None]).all()
    captioned = np.asarray(sheet(frames[:1], torch.tensor([[1.0, 2.0]])))
    assert captioned.shape == (80 + 14, 120, 3)
    assert (captioned[:80] == 0).all()
    assert captioned[80:].max() > 200


def test_masked_rows_and_cut_runs_are_errors() -> None:
    ids, names = torch.tensor([1, 9, 9, 2]), {9: "video"}
    whole = Row("a", ids, torch.tensor([IGNORE, IGNORE, IGNORE, 2]), [], ids == 9)
    check_row(whole, [["video", "video"]], names)
    with pytest.raises(RowError) as masked:
        check_row(
            Row("a", ids, torch.full_like(ids, IGNORE), [], ids == 9),
            [["video", "video"]],
            names,
        )
    with pytest.raises(RowError) as cut:
        check_row(whole, [["video"] * 3], names)
    assert (masked.value.reason, cut.value.reason) == ("no_answer", "cut_run")


def test_control_tokens_in_texts_are_counted_and_nothing_is_set_aside(
    processor: AVProcessor, tmp_path: Path
) -> None:
    rows = [
        words("plain"),
        words("control", question="what <|video|> </s> ?"),
        words("html", question="<video src=x>"),
    ]
    manifest = write_rows(tmp_path / "m.jsonl", rows)
    for tokens in (ProcessorTokens(processor), TextTokens(processor.tokenizer, 90)):
        report = check([manifest], tokens=tokens, output=tmp_path / "out")
        assert reasons(report) == {"control": {"control_text", "placeholder"}}
        assert read_quarantine([tmp_path / "out/quarantine.txt"]) == {}
    for row in rows:
        assert processor.row(Sample.model_validate(row), []).num_targets
