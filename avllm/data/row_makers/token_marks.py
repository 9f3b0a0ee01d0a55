"""Draw the marks of a row's regions: Omni-RGPT's training (arXiv 2501.08326, 3.1)."""

from __future__ import annotations

import random

from avllm.data.region_marks import region_ids
from avllm.data.row import Row
from avllm.data.row_makers.base import Make, RowMaker
from avllm.data.schema import RowError, Sample


class DrawnMarks(RowMaker):
    """Make one row a sample, whose regions get marks that are drawn again in each pass.

    Rows of validation have the marks 0, 1, 2, ... in the order of their regions, as at inference.

    Args:
        n: number of marks; that of the adapter ``token_marks``.

    Raises:
        ValueError: n is below 1.
    """

    varies = True

    def __init__(self, *, n: int = 100) -> None:
        if n < 1:
            raise ValueError(f"token_marks has n {n}; expected 1 or more")
        self.n = n

    def rows(self, sample: Sample, make: Make, drawn: int | None) -> list[Row]:
        """Return the row.

        Raises:
            RowError: ``too_many_regions``: more than there are marks.
        """
        count = len(region_ids(sample.media))
        if drawn is None or count == 0:
            return [make(sample)]
        if count > self.n:
            raise RowError(
                "too_many_regions",
                f"the row has {count} regions; n of data.rows is {self.n}: leave some out",
            )
        return [make(sample, marks=random.Random(drawn).sample(range(self.n), count))]
