"""Tokens of all streams in the order in which they happened (as AVicuna, arXiv 2403.16276, does)."""

from __future__ import annotations

from avllm.errors import UserError
from avllm.layouts.base import Layout
from avllm.tokens import Grid


class Interleave(Layout):
    """Steps sorted by their start second; at the same second the streams stand in the order given.

    Args:
        streams: the order at equal times; streams that are not named follow in the connector's order.
    """

    def __init__(self, *, streams: list[str] | None = None) -> None:
        self.streams = streams or ["video", "audio"]

    def order(self, grids: dict[str, Grid]) -> list[str]:
        names = [s for s in self.streams if s in grids] + [s for s in grids if s not in self.streams]
        bounded = [name for name in names if grids[name].at_most]
        if bounded:
            raise UserError(
                f"layout interleave sorts tokens by time, but content decides how many tokens stream {bounded[0]!r} "
                "has and when they happen; take layout concat"
            )
        steps = [
            (round(float(grids[name].span[t, 0]), 4), rank, t, name)  # rounded: 0.1 + 0.2 is the same second as 0.3
            for rank, name in enumerate(names)
            for t in range(grids[name].steps)
        ]
        return [name for _, _, t, name in sorted(steps) for _ in range(int(grids[name].mask[t].sum()))]
