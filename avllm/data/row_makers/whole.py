"""One row a sample, with all its turns. The default."""

from __future__ import annotations

from avllm.data.row import Row
from avllm.data.row_makers.base import Make, RowMaker
from avllm.data.schema import Sample


class Whole(RowMaker):
    """Train all answers of a chat in one row."""

    def rows(self, sample: Sample, make: Make, drawn: int | None) -> list[Row]:
        """Return one row."""
        return [make(sample)]
