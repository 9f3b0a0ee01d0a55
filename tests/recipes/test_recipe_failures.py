"""Test recipes that cannot go on: one line, an exit status, an account of what was left out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from avllm.recipes import frame as recipe
from avllm.recipes.frame import (
    Dataset,
    Drop,
    RecipeError,
    RecipeRow,
    caption_samples,
    make,
    read_csv,
    rows_of,
)

ABOUT = Dataset(
    "Clips",
    licence="CC0",
    size="two",
    where="nowhere",
    layout="clips.csv  the rows",
    citation="Doe",
)


def rows(source: Path) -> Iterator[RecipeRow | Drop]:
    def build(record: recipe.Record) -> list[RecipeRow]:
        if record["caption"] == "bug":
            raise ValueError("a number that is none")
        part = {"type": "video", "video": record["file"]}
        return [
            RecipeRow(sample)
            for sample in caption_samples(record["file"], part, [record["caption"]], True)
        ]

    yield from rows_of(read_csv(source / "clips.csv", ("file", "caption")), build)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two rows whose media are not there, and one that is cut short."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "clips.csv").write_text("file,caption\na.mp4,A dog.\nb.mp4,A cat.\na.mp4\n")
    return folder


def command(source: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that fails, and return its line."""
    with pytest.raises(SystemExit) as ended:
        recipe.main(ABOUT, rows, [str(source), "--output", str(output)])
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def test_with_all_media_missing_they_are_still_named(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(RecipeError) as caught:
        make(ABOUT, rows, source, output, name="clips")
    assert caught.value.reason == "no_rows"
    for words in (
        "1 malformed_row, 2 missing_media",
        output / "dropped.jsonl",
        output / "missing.txt",
    ):
        assert str(words) in str(caught.value)
    assert {p.name for p in output.iterdir()} == {"dropped.jsonl", "missing.txt"}
    assert (output / "missing.txt").read_text() == "a.mp4\nb.mp4\n"
    dropped = [json.loads(line) for line in (output / "dropped.jsonl").read_text().splitlines()]
    assert [d["reason"] for d in dropped] == ["missing_media", "missing_media", "malformed_row"]
    assert dropped[2]["where"] == "clips.csv:4"
    for name in ("a.mp4", "b.mp4"):
        (source / name).write_bytes(b"x")
    report = make(ABOUT, rows, source, output, name="clips")
    assert (report.rows, report.dropped) == ({"train": 2}, {"malformed_row": 1})


def test_a_recipe_can_say_itself_that_a_file_is_missing(source: Path, tmp_path: Path) -> None:
    def rows_after_a_drop(source: Path) -> Iterator[RecipeRow | Drop]:
        yield Drop("missing_media", "x:1", "far, away.mp4")
        yield from rows(source)

    (source / "a.mp4").write_bytes(b"x")
    report = make(ABOUT, rows_after_a_drop, source, tmp_path / "out", name="clips")
    assert report.missing_files == 2
    assert (tmp_path / "out" / "missing.txt").read_text() == "far, away.mp4\nb.mp4\n"


@pytest.mark.parametrize("text", ["{broken", "[]", "{}", '{"recipe": "clips", "rows": 3}'])
def test_an_account_that_no_recipe_wrote_is_named(
    source: Path, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "recipe.json").write_text(text)
    assert "recipe.json" in command(source, tmp_path / "out", capsys)
    with pytest.raises(RecipeError) as caught:
        make(ABOUT, rows, source, tmp_path / "out", name="clips")
    assert caught.value.reason == "no_account"


def test_a_place_that_cannot_be_written_is_named(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    assert str(file) in command(source, file, capsys)
    assert str(file / "out") in command(source, file / "out", capsys)
    (source / "clips.csv").write_text("file,caption\na.mp4,bug\n")
    assert "ValueError: a number that is none" in command(source, tmp_path / "out", capsys)
