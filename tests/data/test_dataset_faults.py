"""A row that cannot be made, for whatever reason, is a bad row with a reason and ends nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import row, text, write_rows

from avllm.data.dataset import SampleDataset
from avllm.data.row import Row
from avllm.data.row_makers.base import Make, RowMaker
from avllm.data.schema import Sample


class Odd(RowMaker):
    """Fails on some rows as libraries fail."""

    def rows(self, sample: Sample, make: Make, drawn: int | None) -> list[Row]:
        errors = {
            "value": ValueError,
            "deep": RecursionError,
            "key": KeyError,
            "memory": RuntimeError,
            "os": OSError,
        }
        if sample.id in errors:
            raise errors[sample.id]("odd")
        return []


class Broken:
    """A processor whose decoder fails as libraries fail."""

    reads_question = False
    max_length = 10

    def load_clips(self, parts: list[Any], root: Path | None) -> list[Any]:
        if any("odd" in part.path for part in parts):
            raise ValueError("odd scheme")
        return []


@pytest.mark.parametrize("id", ["good", "value", "deep", "key", "memory", "os", "media"])
def test_a_rows_error_is_counted(tmp_path: Path, id: str) -> None:
    media = [{"type": "audio", "audio": "odd.wav"}] if id == "media" else []
    manifest = write_rows(tmp_path / "m.jsonl", [row(id, [*media, text("what ?")], "red")])
    loaded = SampleDataset([manifest], Broken(), maker=Odd())[0]  # type: ignore[arg-type]
    assert loaded.seen == 1
    assert [bad.reason for bad in loaded.bad] == ([] if id == "good" else ["unexpected"])
