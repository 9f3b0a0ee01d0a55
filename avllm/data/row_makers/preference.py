"""Chosen and rejected answers to one question, in one row after one copy of clip and question."""

from __future__ import annotations

from dataclasses import replace

from avllm.data.packing import share_beginning, shared_length
from avllm.data.row import IGNORE, Row
from avllm.data.row_makers.base import Make, RowMaker
from avllm.data.schema import Message, RowError, Sample, TextPart


class Preference(RowMaker):
    """Make one row a sample: its last answer is the chosen one, those of ``rejected`` follow.

    The answers are blind to each other (segments of the row), and packing moves rows whole, so that
    a pair is never torn apart. ``labels`` are set on the chosen answer only: what counts tokens
    (``next_token`` beside ``dpo``) does not learn the rejected ones.
    """

    shares_sequences = True

    def rows(self, sample: Sample, make: Make, drawn: int | None) -> list[Row]:
        """Return one row with the parts ``chosen`` and ``rejected``.

        Raises:
            RowError: the sample has no rejected answer, or one that equals the chosen one.
        """
        rejected = sample.rejected or []
        if not rejected:
            raise RowError(
                "no_rejected", "the row has no `rejected` answers; data.rows: preference needs one"
            )
        if sample.answer in rejected:
            raise RowError("equal_answers", f"the answer {sample.answer!r} is chosen and rejected")
        rows = [_with_role(make(sample, last_only=True), "chosen")]
        rows += [
            _with_role(make(_answered(sample, text), last_only=True), "rejected")
            for text in rejected
        ]
        shared = shared_length(rows)
        if shared == 0:
            raise RowError(
                "late_media", "the media do not come before the answers; put them in front"
            )
        return [share_beginning(rows, shared)]


def _answered(sample: Sample, text: str) -> Sample:
    """Return the sample with another last answer."""
    last = Message(role="assistant", content=[TextPart(text=text)])
    return sample.model_copy(update={"messages": [*sample.messages[:-1], last]})


def _with_role(row: Row, role: str) -> Row:
    """Return the row with its part in a role; rejected answers have no labels."""
    labels = row.labels if role == "chosen" else row.labels.new_full(row.labels.shape, IGNORE)
    return replace(row, labels=labels, parts=tuple(replace(part, role=role) for part in row.parts))
