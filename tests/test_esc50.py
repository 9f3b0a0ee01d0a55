"""ESC-50 and ESC-10 in their authors' layouts: kept, missing, and what may not leak."""

from __future__ import annotations

import importlib
import json
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from data_recipes.sources_captions import ESC_COLUMNS, touch, write_csv
from data_recipes.sources_captions import esc50 as write_esc50

from avllm.data.manifest import read_manifest
from avllm.data.schema import resolve
from avllm.recipes.frame import RecipeError, RecipeReport, make

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT / "data_recipes") not in sys.path:
    sys.path.append(str(ROOT / "data_recipes"))

esc50 = importlib.import_module("esc50")
REAL = ROOT / "../shared/data/esc10"
SPLITS = ("train", "validation", "test")


@pytest.fixture
def new_form(tmp_path: Path) -> Path:
    """meta/esc50.csv and audio/: three folds of three classes; takes A and B of one source."""
    write_esc50(tmp_path / "ESC-50")
    return tmp_path / "ESC-50"


@pytest.fixture
def old_form(tmp_path: Path) -> Path:
    """One folder a class, FOLD-CLIPID-TAKE.ogg, and a file that is no sound of the data set."""
    source = tmp_path / "ESC-10"
    for folder in ("001 - Dog bark", "004 - Baby cry"):
        names = ("1-10-A", "1-10-B", "2-20-A", "2-21-A", "2-22-A", "3-30-A")
        touch(source, *(f"{folder}/{name}.ogg" for name in names))
    touch(source, "001 - Dog bark/notes.txt")
    return source


def run(source: Path, out: Path, fold: int = 1, **options: Any) -> RecipeReport:
    """Run the recipe."""
    return make(esc50.ABOUT, esc50.rows, source, out, name="esc50", test_fold=fold, **options)


def dropped(out: Path) -> list[tuple[str, str]]:
    """(reason, where) of each drop."""
    lines = (out / "dropped.jsonl").read_text(encoding="utf-8").splitlines()
    return [(drop["reason"], drop["where"]) for drop in map(json.loads, lines)]


def clips(out: Path, name: str) -> set[tuple[str, str]]:
    """(source recording, take) of a manifest's rows."""
    path = out / f"{name}.jsonl"
    return (
        {(str(s.meta["clip"]), str(s.meta["take"])) for s in read_manifest(path)}
        if path.exists()
        else set()
    )


@pytest.mark.parametrize("form", ["new_form", "old_form"])
def test_no_recording_is_in_two_splits(
    form: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(form)
    for fold in (1, 2, 3):
        out = tmp_path / f"out{fold}"
        run(source, out, fold, validation=0.4)
        recordings = {name: {clip for clip, _ in clips(out, name)} for name in SPLITS}
        assert all(recordings.values())
        assert all(not (recordings[a] & recordings[b]) for a, b in combinations(SPLITS, 2))
        assert {s.meta["fold"] for s in read_manifest(out / "test.jsonl")} == {fold}
        assert fold not in {s.meta["fold"] for s in read_manifest(out / "train.jsonl")}
        assert clips(out, "captions_train") == clips(out, "train")
        assert clips(out, "captions_validation") == clips(out, "validation")


def test_every_clip_is_in_one_split(new_form: Path, tmp_path: Path) -> None:
    run(new_form, tmp_path / "out", 2, validation=0.4)
    assert sum(len(clips(tmp_path / "out", name)) for name in SPLITS) == 27
    assert dropped(tmp_path / "out") == [("unknown_class", "esc50.csv:29")]
    report = run(new_form, tmp_path / "out", 2, esc10=True, validation=0.0)
    assert report.dropped == {"unknown_class": 1, "not_in_esc10": 9}
    assert not (tmp_path / "out" / "validation.jsonl").exists()
    assert {name: len(clips(tmp_path / "out", name)) for name in SPLITS} == {
        "train": 12,
        "validation": 0,
        "test": 6,
    }


def test_rows_ask_and_answer_in_words(old_form: Path, tmp_path: Path) -> None:
    run(old_form, tmp_path / "out", 3, validation=0.0)
    train, test = (read_manifest(tmp_path / "out" / f"{name}.jsonl") for name in ("train", "test"))
    captions = read_manifest(tmp_path / "out" / "captions_train.jsonl")
    assert len(train) == len(captions) == 10 * len(esc50.QUESTIONS)
    assert {s.messages[0].text for s in train} == set(esc50.QUESTIONS)
    assert {s.messages[0].text for s in test} == {"What do you hear?"}
    assert (
        {s.answer for s in test} == set(test[0].choices or []) == {"a dog barking", "a baby crying"}
    )
    assert {s.messages[0].text for s in captions} == {""}
    assert "you can hear a dog barking" in {s.answer for s in captions}
    assert {s.source for s in [*train, *test, *captions]} == {"esc10"}
    run(old_form, tmp_path / "one", 3, wordings=1)
    assert {s.messages[0].text for s in read_manifest(tmp_path / "one" / "train.jsonl")} == {
        "What do you hear?"
    }


def test_licence_and_name_are_those_of_the_part(new_form: Path, tmp_path: Path) -> None:
    run(new_form, tmp_path / "out")
    found = {
        (s.meta["take"], s.kind): (s.source, s.licence)
        for s in read_manifest(tmp_path / "out" / "test.jsonl")
    }
    assert found["A", "heard.pig"] == ("esc50", "CC BY-NC 3.0")
    assert found["A", "heard.dog"][0] == "esc10"
    assert (found["A", "heard.dog"][1] or "").startswith("CC BY 3.0")


def test_media_are_found_from_the_manifest_and_not_copied(new_form: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    run(new_form, out)
    for sample in read_manifest(out / "train.jsonl"):
        assert not Path(sample.media[0].path).is_absolute()
        assert sample.media[0].end == 5.0
        assert resolve(sample.media[0], out).resolve().parent == new_form / "audio"
    assert {p.suffix for p in out.rglob("*.*")} == {".jsonl", ".json", ".txt"}


def test_missing_and_empty_clips_are_named_and_change_no_split(
    new_form: Path, tmp_path: Path
) -> None:
    run(new_form, tmp_path / "whole", validation=0.4)
    gone, empty = sorted((new_form / "audio").iterdir())[::20]
    gone.unlink()
    empty.write_bytes(b"")
    report = run(new_form, tmp_path / "out", validation=0.4)
    assert (report.missing_files, report.dropped["missing_media"]) == (2, 1)
    assert report.dropped["empty_media"] > 1
    names = (tmp_path / "out" / "missing.txt").read_text().splitlines()
    assert sorted(names) == [f"audio/{gone.name}", f"audio/{empty.name}"]
    for split in SPLITS:
        there = [
            s
            for s in read_manifest(tmp_path / "whole" / f"{split}.jsonl")
            if resolved(s, tmp_path / "whole")
        ]
        assert [s.id for s in read_manifest(tmp_path / "out" / f"{split}.jsonl")] == [
            s.id for s in there
        ]


def resolved(sample: Any, folder: Path) -> bool:
    """Whether there is something in the row's file."""
    path = resolve(sample.media[0], folder)
    return path.is_file() and path.stat().st_size > 0


def test_what_was_left_out_is_counted(old_form: Path, tmp_path: Path) -> None:
    touch(old_form, "011 - Accordion/1-1-A.ogg")
    run(old_form, tmp_path / "out")
    assert dropped(tmp_path / "out") == [
        ("no_sound_of_the_set", "001 - Dog bark/notes.txt"),
        ("unknown_class", "011 - Accordion/1-1-A.ogg"),
    ]


def test_a_source_shared_with_the_test_fold_trains_nothing(old_form: Path, tmp_path: Path) -> None:
    shared = "001 - Dog bark/2-10-C.ogg"  # the recording of 1-10-A and 1-10-B
    touch(old_form, shared)
    run(old_form, tmp_path / "out")
    assert "10" not in {
        clip for name in ("train", "validation") for clip, _ in clips(tmp_path / "out", name)
    }
    assert ("shares_source_with_test", shared) in dropped(tmp_path / "out")


@pytest.mark.parametrize(
    "spoil, reason, words",
    [
        (lambda s: (s / "meta" / "esc50.csv").unlink(), "absent_files", r"meta/esc50\.csv"),
        (lambda s: write_csv(s / "meta/esc50.csv", [ESC_COLUMNS[1:]]), "no_column", "filename"),
        (lambda s: write_csv(s / "meta/esc50.csv", [ESC_COLUMNS]), "no_rows", ""),
        (
            lambda s: write_csv(
                s / "meta/esc50.csv", [ESC_COLUMNS, ("a.wav", "x", 0, "dog", "True", "1", "A")]
            ),
            "no_rows",
            "1 malformed_row.*esc50.csv:2",
        ),
    ],
)
def test_a_source_that_cannot_be_read_says_why(
    new_form: Path, tmp_path: Path, spoil: Any, reason: str, words: str
) -> None:
    spoil(new_form)
    with pytest.raises(RecipeError, match=words) as caught:
        run(new_form, tmp_path / "out")
    assert caught.value.reason == reason


def test_options_that_cannot_be_are_errors(new_form: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"\[1, 2, 3\]") as caught:
        run(new_form, tmp_path / "out", 5)
    assert caught.value.reason == "no_fold"
    with pytest.raises(RecipeError) as caught:
        run(new_form, tmp_path / "out", validation=1.0)
    assert caught.value.reason == "bad_share"


def test_words_for_all_fifty_classes() -> None:
    assert len(esc50.ANSWERS) == len(set(esc50.ANSWERS.values())) == 50
    assert set(esc50.OLD_NAMES.values()) <= set(esc50.ANSWERS)


@pytest.mark.skipif(not REAL.is_dir(), reason="the ESC-10 recordings are not beside this checkout")
def test_the_real_recordings(tmp_path: Path) -> None:
    assert run(REAL, tmp_path, 4).dropped == {}
    rows = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    assert len(rows) == 80
    assert len(clips(tmp_path, "train") | clips(tmp_path, "validation")) == 240
    assert {len([r for r in rows if r["kind"] == kind]) for kind in {r["kind"] for r in rows}} == {
        8
    }
    assert len(rows[0]["choices"]) == 10
