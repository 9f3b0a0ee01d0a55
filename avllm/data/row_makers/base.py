"""Define a row maker: it turns a sample into the rows that are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol

from avllm.data.row import Row
from avllm.data.schema import Sample


class Make(Protocol):
    """Make one row of a sample, or of a changed copy of it."""

    def __call__(
        self,
        sample: Sample,
        *,
        last_only: bool = False,
        variant: str | None = None,
        marks: Sequence[int] | None = None,
    ) -> Row:
        """Make a row.

        Args:
            sample: the messages; their media may be other clips than the original's, which are
                then decoded too.
            last_only: train the last answer alone.
            variant: see :class:`~avllm.data.row.Row`.
            marks: of the sample's regions, in their order; None takes 0, 1, 2, ...

        Raises:
            RowError: no row can be made. MediaError: a file cannot be read.
        """
        ...


class RowMaker:
    """Make the rows of a sample; one file each, whose keyword arguments are its options.

    Attributes:
        varies: True where rows depend on ``drawn``, or have other clips than the sample; others are
            tokenized once and remembered.
        has_variants: True where rows name a variant; every process then brings as many micro
            batches as the others.
        shares_sequences: True where a row holds answers that must not see each other
            (``Row.segments``): the LLM is then tried, as with ``data.pack``, before the run.
    """

    varies: ClassVar[bool] = False
    has_variants: ClassVar[bool] = False
    shares_sequences: ClassVar[bool] = False

    def rows(self, sample: Sample, make: Make, drawn: int | None) -> list[Row]:
        """Return the rows of a sample, at least one.

        Args:
            sample: a row of the manifest.
            make: makes a row.
            drawn: the sample's place in the run, which random choices follow from; None in
                validation.

        Raises:
            RowError: the sample cannot be used; it is counted as a bad row.
        """
        raise NotImplementedError(f"{type(self).__name__}.rows")
