"""Test recipes that make media: missing and empty clips are named, and made up for later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from making_fixtures import (
    RATE,
    captioned_row,
    read_lines,
    recipe_module,
    tone,
    write_clip,
    write_lines,
)

from avllm.data.media.write import write_wav
from avllm.recipes.frame import RecipeReport, make

OPTIONS: dict[str, dict[str, Any]] = {
    "compose_audio": {"rate": RATE, "shard_size": 1},
    "pu_valor": {
        "shortest": 0.5,
        "longest": 1.0,
        "most": 2,
        "width": 48,
        "height": 32,
        "shard_size": 1,
    },
}


def run(name: str, source: Path, output: Path) -> RecipeReport:
    module = recipe_module(name)
    return make(module.ABOUT, module.rows, source, output, name=name, **OPTIONS[name])


@pytest.fixture(params=sorted(OPTIONS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def source(name: str, tmp_path: Path) -> Path:
    """Write six clips with captions."""
    folder = tmp_path / "source"
    rows = []
    folder.mkdir()
    for number in range(6):
        hertz = 700.0 + 300 * number
        if name == "pu_valor":
            file, kind = f"{number}.mp4", "video"
            write_clip(folder / file, ("red", "green", "blue")[number % 3], hertz, 1.0)
        else:
            file, kind = f"{number}.wav", "audio"
            write_wav(folder / file, tone(hertz, 0.5).astype(np.float32), RATE)
        rows.append(captioned_row(f"c{number}", kind, file, f"A tone of {hertz:.0f} hertz."))
    write_lines(folder / "train.jsonl", rows)
    return folder


def test_clips_that_are_missing_or_empty_are_named_and_made_up_for(
    name: str, source: Path, tmp_path: Path
) -> None:
    whole = run(name, source, tmp_path / "whole")
    assert whole.missing_files == 0
    gone, empty = sorted(path for path in source.iterdir() if path.suffix != ".jsonl")[:2]
    contents = {path: path.read_bytes() for path in (gone, empty)}
    gone.unlink()
    empty.write_bytes(b"")
    report = run(name, source, tmp_path / "out")
    assert report.missing_files == 2
    assert sorted((tmp_path / "out" / "missing.txt").read_text().splitlines()) == [
        str(gone),
        str(empty),
    ]
    assert (report.dropped["missing_media"], report.dropped["empty_media"]) == (1, 1)
    where = {
        drop["detail"]: drop["where"] for drop in read_lines(tmp_path / "out" / "dropped.jsonl")
    }
    assert (where[str(gone)], where[str(empty)]) == ("train.jsonl:1", "train.jsonl:2")
    for path, content in contents.items():
        path.write_bytes(content)
    assert run(name, source, tmp_path / "out").missing_files == 0
    assert read_lines(tmp_path / "out" / "train.jsonl") == read_lines(
        tmp_path / "whole" / "train.jsonl"
    )
