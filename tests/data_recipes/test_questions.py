"""Recipes of questions and grounding: what becomes of each row of the sources."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from data_recipes.made import Made

from avllm.data.schema import Sample
from avllm.evaluation.benchmarks.base import score_by_form
from avllm.recipes.frame import make
from data_recipes import (
    activitynet_qa,
    avqa,
    charades_sta,
    msrvtt_qa,
    music_avqa,
    next_qa,
    sources_questions,
    unav100,
)

Run = Callable[..., Made]


@pytest.fixture
def made(tmp_path: Path) -> Run:
    return lambda recipe, **options: Made(recipe, sources_questions, tmp_path, **options)


def asked(sample: Sample) -> tuple[str, str, str | None, str | None]:
    """(file, question, answer, kind)."""
    (part,) = sample.media
    return Path(part.path).name, sample.messages[0].text, sample.answer, sample.kind


def test_msrvtt_qa(made: Run) -> None:
    run = made(msrvtt_qa)
    assert [asked(row) for row in run.rows("validation")] == [
        ("video6513.mp4", "what are three people sitting on?", "couch", "what"),
        ("video6513.mp4", "which couple sits on a couch?", "family", "other"),
    ]
    assert [asked(row) for row in run.rows("test")] == [
        ("video7010.mp4", "who plays?", "cat", "who")
    ]
    assert run.dropped == [("empty_answer", "val_qa.json[2]"), ("empty_answer", "test_qa.json[0]")]


def test_activitynet_qa_joins_answers_by_their_ids(made: Run) -> None:
    run = made(activitynet_qa)
    assert [asked(row) for row in run.rows("validation")] == [
        ("v_okC18bPTils.mkv", "are all the people in the video men", "no", "yes_no"),
        ("-_x9aaa-bbb.mp4", "what happened before skiing", "put on shoes", "temporal"),
    ]
    assert run.dropped == [("no_answer", "val_q.json[2]")]


def test_music_avqa_fills_slots(made: Run) -> None:
    run = made(music_avqa)
    kind = "audio-visual.counting"
    assert [asked(row) for row in run.rows("train")] == [
        ("00000108.mp4", "Is the guzheng louder than the acoustic guitar?", "yes", kind),
        ("00000108.mp4", "How many sounding banjo in the video?", "one", kind),
    ]
    (test,) = run.rows("test")
    asked_of_test = (
        "sa00008442.mp4",
        "What kind of instrument is the leftest instrument?",
        "electric bass",
        kind,
    )
    assert asked(test) == asked_of_test
    assert len(run.rows("validation")) == 1  # from the older folder


def test_music_avqa_names_its_42_answers_where_it_is_scored(made: Run) -> None:
    run = made(music_avqa)
    (test,) = run.rows("test")
    assert test.choices is not None
    assert len(set(test.choices)) == 42
    assert score_by_form(test, "It is the electric bass.", 60.0, "unanswerable").correct
    assert {row.choices for row in run.rows("train")} == {None}


def test_music_avqa_says_why_it_drops(made: Run) -> None:
    reasons = [reason for reason, _ in made(music_avqa).dropped]
    expected = ["slot_mismatch", "deleted_by_authors", "unknown_answer"]
    assert reasons == [*expected, "contradictory_answers", "contradictory_answers"]


def test_music_avqa_of_which_a_row_lacks_a_field(made: Run, tmp_path: Path) -> None:
    run = made(music_avqa)
    path = run.source / "data/json_update/avqa-test.json"
    path.write_text(
        json.dumps([*json.loads(path.read_text()), {"video_id": "00000108", "question_id": 8}])
    )
    report = make(music_avqa.ABOUT, music_avqa.rows, run.source, tmp_path / "again")
    assert (report.rows["test"], report.dropped["malformed_row"]) == (1, 1)


def test_avqa_lists_the_choices_and_answers_with_one(made: Run) -> None:
    run = made(avqa)
    (row,) = run.rows("train")
    listed = "(A) motorboat\n(B) Yacht consignment\n(C) Sailboat set sail\n(D) Consignment car"
    question = f"What happened in the video?\n{listed}"
    assert asked(row) == ("-HG3Omg_89c_30.mp4", question, "Yacht consignment", "view.come_from")
    assert [
        score_by_form(row, said, 10.0, "").correct
        for said in ("B", "(b)", "yacht consignment", "C")
    ] == [
        True,
        True,
        True,
        False,
    ]
    reasons = [reason for reason, _ in run.dropped]
    assert reasons == ["empty_choice", "empty_choice", "answer_out_of_range"]


def test_next_qa_reads_both_tasks(made: Run) -> None:
    run = made(next_qa)
    (train,) = run.rows("train")
    assert train.choices == [
        "roll the handle",
        "tap their feet",
        "strum the string",
        "hit with sticks",
        "pat with hand",
    ]
    assert asked(train)[2:] == ("strum the string", "causal.how")
    assert train.messages[0].text.endswith("\n(E) pat with hand")
    place, cat = run.rows("test")
    assert asked(place) == ("5772591393.mp4", "where is this", "house", "descriptive.location")
    assert (place.choices, place.answers) == (None, ["home"])
    assert cat.answers is None  # the second answer is the first
    assert run.dropped == [("answer_out_of_range", "train.csv:3"), ("unknown_type", "train.csv:4")]


def test_charades_sta_answers_in_seconds_and_keeps_what_was_annotated(made: Run) -> None:
    run = made(charades_sta)
    first, late = run.rows("train")
    assert first.answer == "From 0.0 to 6.9 seconds."
    assert first.meta == {"spans": [[0.0, 6.9]], "duration": 31.0}
    assert late.answer == "From 24.3 to 31.0 seconds."
    assert late.meta == {"spans": [[24.3, 31.0]], "duration": 31.0, "annotated": [[24.3, 31.6]]}
    (test,) = run.rows("test")
    question = (
        "When does this happen in the video: person turn a light on? "
        "Give its start and end in seconds."
    )
    assert asked(test) == ("3MSZA.mp4", question, "From 24.3 to 30.4 seconds.", "grounding")


def test_charades_sta_drops_what_cannot_be(made: Run) -> None:
    assert made(charades_sta).dropped == [
        ("outside_clip", "charades_sta_train.txt:3"),
        ("outside_clip", "charades_sta_train.txt:4"),
        ("bad_interval", "charades_sta_train.txt:5"),
        ("malformed_line", "charades_sta_train.txt:6"),
    ]


def test_charades_sta_can_be_strict_and_cannot_check_without_lengths(
    made: Run, tmp_path: Path
) -> None:
    run = made(charades_sta, overrun=0.0)
    assert len(run.rows("train")) == 1
    (run.source / "Charades_v1_train.csv").unlink()
    report = make(
        charades_sta.ABOUT, charades_sta.rows, run.source, tmp_path / "again", overrun=0.0
    )
    assert report.rows["train"] == 4


def test_unav100_asks_for_all_events_and_for_each_label(made: Run) -> None:
    run = made(unav100)
    dense, barking, speaking = run.rows("train")
    assert dense.kind == "dense"
    assert dense.answer == (
        "From 2.1 to 8.4 seconds: man speaking.\n"
        "From 5.0 to 9.5 seconds: dog barking.\n"
        "From 20.0 to 25.0 seconds: dog barking."
    )
    assert dense.meta["annotated"] == [[20.0, 25.26], [2.1, 8.4], [5.0, 9.5]]
    assert barking.id == "unav100-__2MwJ2uHu0-dog_barking"
    assert barking.answer == "From 5.0 to 9.5 seconds, from 20.0 to 25.0 seconds."
    assert "dog barking" in barking.messages[0].text
    assert speaking.answer == "From 2.1 to 8.4 seconds."
    assert "annotated" not in speaking.meta


def test_unav100_drops_the_rows_that_one_bad_event_spoils_and_no_other(made: Run) -> None:
    run = made(unav100)
    (test,) = run.rows("test")
    assert asked(test)[2:] == ("From 0.0 to 10.0 seconds.", "grounding")
    name = 'unav100_annotations.json["2TvyObYvkeY"]'
    assert run.dropped == [
        ("outside_clip", name),
        ("outside_clip", f"{name} cat purring"),
        ("no_events", 'unav100_annotations.json["-0XOm9bG9Zw"]'),
    ]


def test_unav100_writes_one_form_when_told(made: Run) -> None:
    assert {row.kind for row in made(unav100, dense=False).rows("train")} == {"grounding"}
    assert {row.kind for row in made(unav100, grounding=False).rows("train")} == {"dense"}
