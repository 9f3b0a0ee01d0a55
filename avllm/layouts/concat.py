"""One stream behind the other: Video-LLaMA's order."""

from __future__ import annotations

from avllm.layouts.base import Layout
from avllm.tokens import Grid


class Concat(Layout):
    """All tokens of the first stream, then all of the next.

    Args:
        streams: the order; streams that are not named follow in the connector's order.
    """

    def __init__(self, *, streams: list[str] | None = None) -> None:
        self.streams = streams or []

    def order(self, grids: dict[str, Grid]) -> list[str]:
        names = [s for s in self.streams if s in grids] + [s for s in grids if s not in self.streams]
        return [name for name in names for _ in range(grids[name].places)]
