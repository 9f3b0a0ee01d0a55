"""One row an answer: a chat of three turns becomes three rows, each with the turns before it as given."""

from __future__ import annotations

from avllm.data.row import Row
from avllm.data.row_makers.base import Make, RowMaker
from avllm.data.schema import Sample


class EachTurn(RowMaker):
    """Train each answer in a row by itself, so that a connector that reads the question reads the right one."""

    def rows(self, sample: Sample, make: Make, drawn: int | None) -> list[Row]:
        """Return a row for each assistant turn, in order."""
        rows = []
        for place, message in enumerate(sample.messages, start=1):
            if message.role == "assistant":
                beginning = sample.model_copy(update={"messages": sample.messages[:place]})
                rows.append(make(beginning, last_only=True))
        return rows
