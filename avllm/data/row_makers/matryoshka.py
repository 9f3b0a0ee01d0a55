"""Make a row at each of several rates of tokens: Llama-MTSK's training (arXiv 2503.06362, 3.2)."""

from __future__ import annotations

import random
from itertools import product

from avllm.data.row import Row
from avllm.data.row_makers.base import Make, RowMaker
from avllm.data.schema import Sample


class Matryoshka(RowMaker):
    """Train each sample at every combination of rates, or at one that is drawn.

    Rows name their rates (``video=2,audio=4``), which the adapter ``pool_mlp`` reads. All of them
    weigh the same, as in the paper, whose loss is the mean over the pairs of rates.

    Args:
        rates: by stream, the rates of its ``pool_mlp``.
        mode: ``all`` combinations, or ``sample``: one for each sample and pass, drawn evenly, at
            the cost of one row. Validation takes all.

    Raises:
        ValueError: an unknown mode, or a stream without rates.
    """

    varies = True
    has_variants = True

    def __init__(self, *, rates: dict[str, list[int]], mode: str = "all") -> None:
        if mode not in ("all", "sample"):
            raise ValueError(f"matryoshka has mode {mode!r}; expected 'all' or 'sample'")
        if not rates or not all(rates.values()):
            raise ValueError(
                f"matryoshka has rates {rates}; expected at least one rate for each stream"
            )
        self.mode = mode
        self.variants: list[str] = []
        for chosen in product(*rates.values()):
            named = zip(rates, chosen, strict=True)
            self.variants.append(",".join(f"{stream}={rate}" for stream, rate in named))

    def rows(self, sample: Sample, make: Make, drawn: int | None) -> list[Row]:
        """Return a row for each combination, or for the one that is drawn."""
        if self.mode == "all" or drawn is None:
            variants = self.variants
        else:
            variants = [random.Random(drawn).choice(self.variants)]
        return [make(sample, variant=variant) for variant in variants]
