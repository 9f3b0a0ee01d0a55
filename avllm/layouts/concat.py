"""Place the streams one after the other, as Video-LLaMA (arXiv 2306.02858) does."""

from __future__ import annotations

from avllm.layouts.base import Layout, stream_order
from avllm.tokens import Grid


class Concat(Layout):
    """Place all tokens of the first stream, then all of the next.

    Args:
        streams: the order; streams that are not named follow in the connector's order.
    """

    def __init__(self, *, streams: list[str] | None = None) -> None:
        self.streams = streams or []

    def order(self, grids: dict[str, Grid]) -> list[str]:
        order: list[str] = []
        for stream in stream_order(self.streams, grids):
            order += [stream] * grids[stream].places
        return order
