"""Mark rows of training, so that a stream is fed another's embeddings in them alone."""

from __future__ import annotations

from avllm.data.row import Row
from avllm.data.row_makers.base import Make, RowMaker
from avllm.data.schema import Sample


class TrainAsRows(RowMaker):
    """Make one row a sample, in the variant that the adapter ``train_as`` reads.

    Rows of validation are unmarked: there, as at inference, each stream is its own.
    """

    varies = True
    has_variants = True

    def rows(self, sample: Sample, make: Make, drawn: int | None) -> list[Row]:
        """Return the row, marked if it is trained on."""
        return [make(sample, variant=None if drawn is None else "train_as")]
