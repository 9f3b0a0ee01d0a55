"""ESC-50 and ESC-10 in their authors' layouts -> manifests: what is there, what is missing, what may not leak."""

from __future__ import annotations

import csv
import importlib
import json
import sys
import wave
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from avllm.data.manifest import read_manifest
from avllm.data.schema import resolve

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT / "data_recipes") not in sys.path:
    sys.path.insert(0, str(ROOT / "data_recipes"))

esc50 = importlib.import_module("esc50")
REAL = ROOT / "../shared/data/esc10"
SPLITS = ("train", "validation", "test")


def write_sound(path: Path) -> None:
    """A tenth of a second of silence as WAV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(44_100)
        file.writeframes(b"\0\0" * 4_410)


@pytest.fixture
def new_form(tmp_path: Path) -> Path:
    """meta/esc50.csv and audio/: three folds of three classes, one not in ESC-10; takes A and B of one source."""
    source, rows = tmp_path / "ESC-50", []
    for number, (category, esc10) in enumerate({"dog": "True", "rain": "True", "pig": "False"}.items()):
        for fold in (1, 2, 3):
            for clip, take in [(f"{fold}{number}00", "A"), (f"{fold}{number}00", "B"), (f"{fold}{number}01", "A")]:
                name = f"{fold}-{clip}-{take}-{number}.wav"
                write_sound(source / "audio" / name)
                rows.append((name, fold, number, category, esc10, clip, take))
    write_table(source, rows)
    return source


def write_table(source: Path, rows: list[tuple[Any, ...]], columns: tuple[str, ...] = esc50.COLUMNS) -> None:
    """meta/esc50.csv as its author writes it."""
    (source / "meta").mkdir(parents=True, exist_ok=True)
    with (source / "meta" / "esc50.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([columns, *rows])


@pytest.fixture
def old_form(tmp_path: Path) -> Path:
    """One folder a class, FOLD-CLIPID-TAKE.ogg, and a file that is no sound of the data set."""
    source = tmp_path / "ESC-10"
    for folder in ("001 - Dog bark", "004 - Baby cry"):
        for name in ("1-10-A", "1-10-B", "2-20-A", "2-21-A", "2-22-A", "3-30-A"):
            write_sound(source / folder / f"{name}.ogg")  # never decoded here, so the container does not matter
    (source / "001 - Dog bark" / "notes.txt").write_text("not a sound")
    return source


def make(source: Path, out: Path, *options: str, fold: int = 1) -> int:
    """Run the recipe."""
    return int(esc50.main([str(source), str(out), "--test-fold", str(fold), *options]))


def clips(out: Path, name: str) -> set[tuple[str, str]]:
    """(source recording, take) of a manifest's rows."""
    path = out / f"{name}.jsonl"
    return {(str(s.meta["clip"]), str(s.meta["take"])) for s in read_manifest(path)} if path.exists() else set()


@pytest.mark.parametrize("form", ["new_form", "old_form"])
def test_no_recording_stands_in_two_splits(form: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    source = request.getfixturevalue(form)
    for fold in (1, 2, 3):
        out = tmp_path / f"out{fold}"
        assert make(source, out, "--validation", "0.4", fold=fold) == 0
        recordings = {name: {clip for clip, _ in clips(out, name)} for name in SPLITS}
        assert all(recordings.values())
        assert all(not (recordings[a] & recordings[b]) for a, b in combinations(SPLITS, 2))
        assert {s.meta["fold"] for s in read_manifest(out / "test.jsonl")} == {fold}
        assert fold not in {s.meta["fold"] for s in read_manifest(out / "train.jsonl")}
        assert clips(out, "captions_train") == clips(out, "train")


def test_every_clip_is_in_one_split(new_form: Path, tmp_path: Path) -> None:
    make(new_form, tmp_path / "out", "--validation", "0.4", fold=2)
    assert sum(len(clips(tmp_path / "out", name)) for name in SPLITS) == 27
    make(new_form, tmp_path / "ten", "--esc10", "--validation", "0", fold=2)
    assert not (tmp_path / "ten" / "validation.jsonl").exists()
    assert {name: len(clips(tmp_path / "ten", name)) for name in SPLITS} == {"train": 12, "validation": 0, "test": 6}


def test_rows_ask_and_answer_in_words(old_form: Path, tmp_path: Path) -> None:
    make(old_form, tmp_path / "out", "--validation", "0", fold=3)
    train, test = (read_manifest(tmp_path / "out" / f"{name}.jsonl") for name in ("train", "test"))
    captions = read_manifest(tmp_path / "out" / "captions_train.jsonl")
    assert len(train) == len(captions) == 10 * len(esc50.QUESTIONS)
    assert {s.messages[0].text for s in train} == set(esc50.QUESTIONS)
    assert {s.messages[0].text for s in test} == {"What do you hear?"}
    assert {s.answer for s in test} == set(test[0].choices or []) == {"a dog barking", "a baby crying"}
    assert {s.messages[0].text for s in captions} == {""}
    assert "you can hear a dog barking" in {s.answer for s in captions}
    assert all(s.licence for s in [*train, *test, *captions])


def test_media_are_found_from_the_manifest_and_not_copied(new_form: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    make(new_form, out)
    for sample in read_manifest(out / "train.jsonl"):
        assert not Path(sample.media[0].path).is_absolute()
        assert resolve(sample.media[0], out).resolve().parent == new_form / "audio"
    assert {p.suffix for p in out.rglob("*.*")} == {".jsonl"}


def test_missing_and_empty_files_are_named(new_form: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone, empty = sorted((new_form / "audio").iterdir())[:2]
    gone.unlink()
    empty.write_bytes(b"")
    assert make(new_form, tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert "1 missing" in said
    assert gone.name in said
    assert "1 empty file" in said
    assert empty.name in said
    names = {Path(s.media[0].path).name for s in read_manifest(tmp_path / "out" / "test.jsonl")}
    assert not names & {gone.name, empty.name}


def test_what_was_left_out_is_counted(old_form: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sound(old_form / "011 - Accordion" / "1-1-A.ogg")
    assert make(old_form, tmp_path / "out") == 0
    said = capsys.readouterr().err
    assert "1 no sound of the data set" in said
    assert "notes.txt" in said
    assert "1 unknown class" in said


def test_a_source_shared_with_the_test_fold_trains_nothing(old_form: Path, tmp_path: Path) -> None:
    write_sound(old_form / "001 - Dog bark" / "2-10-C.ogg")  # the recording of 1-10-A and 1-10-B
    make(old_form, tmp_path / "out", fold=1)
    assert "10" not in {clip for name in ("train", "validation") for clip, _ in clips(tmp_path / "out", name)}


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda s: (s / "meta" / "esc50.csv").unlink(), "neither meta/esc50.csv nor folders"),
        (lambda s: write_table(s, [], esc50.COLUMNS[1:]), "no column filename"),
        (lambda s: write_table(s, []), "no usable recording"),
        (lambda s: write_table(s, [("a.wav", "x", 0, "dog", "True", "1", "A")]), "line 2: fold is 'x'"),
    ],
)
def test_a_source_that_cannot_be_read_says_why(new_form: Path, tmp_path: Path, spoil: Any, words: str) -> None:
    spoil(new_form)
    with pytest.raises(SystemExit, match=words):
        make(new_form, tmp_path / "out")


def test_a_fold_that_is_not_there_is_an_error(new_form: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"test fold 5: there are folds \[1, 2, 3\]"):
        make(new_form, tmp_path / "out", fold=5)


def test_words_for_all_fifty_classes() -> None:
    assert len(esc50.ANSWERS) == len(set(esc50.ANSWERS.values())) == 50
    assert set(esc50.OLD_NAMES.values()) <= set(esc50.ANSWERS)


def test_the_same_command_writes_the_same_bytes(new_form: Path, tmp_path: Path) -> None:
    for _ in range(2):
        make(new_form, tmp_path / "out", "--validation", "0.4")
    first = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    make(new_form, tmp_path / "out", "--validation", "0.4")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == first


@pytest.mark.skipif(not REAL.is_dir(), reason="the ESC-10 recordings are not beside this checkout")
def test_the_real_recordings(tmp_path: Path) -> None:
    make(REAL, tmp_path, fold=4)
    rows = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    assert len(rows) == 80
    assert len(clips(tmp_path, "train") | clips(tmp_path, "validation")) == 240
    assert {len([r for r in rows if r["kind"] == kind]) for kind in {r["kind"] for r in rows}} == {8}
    assert len(rows[0]["choices"]) == 10
