"""Make one row an answer: a chat of three turns becomes three rows, each with its history."""

from __future__ import annotations

from avllm.data.row import Row
from avllm.data.row_makers.base import Make, RowMaker
from avllm.data.schema import Sample


class EachTurn(RowMaker):
    """Train each answer in a separate row, for connectors that read the question."""

    def rows(self, sample: Sample, make: Make, drawn: int | None) -> list[Row]:
        """Return a row for each assistant turn, in order."""
        rows = []
        for place, message in enumerate(sample.messages, start=1):
            if message.role == "assistant":
                beginning = sample.model_copy(update={"messages": sample.messages[:place]})
                rows.append(make(beginning, last_only=True))
        return rows
