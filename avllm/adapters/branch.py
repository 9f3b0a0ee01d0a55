"""One stream read in two ways: a copy under another name, for adapters to work on apart from the first."""

from __future__ import annotations

from avllm.adapters.base import Adapter, Prompt
from avllm.tokens import Grid, Tokens


class Branch(Adapter):
    """Copy a stream. A later ``join`` (or any fusion) has to consume the copy.

    Args:
        stream: the stream to copy.
        to: name of the copy, for example ``video.grid``.
    """

    def __init__(self, widths: dict[str, int], llm_dim: int, *, stream: str, to: str) -> None:
        super().__init__(widths, llm_dim)
        self.stream, self.made = stream, to  # `to` is torch's
        if to in widths:
            raise ValueError(f"branch cannot make {to!r}: a stream of that name is there already")
        self.out_widths[to] = self.require(stream)

    def forward(self, streams: dict[str, Tokens], prompt: Prompt | None = None) -> dict[str, Tokens]:
        return {**streams, self.made: streams[self.stream]} if self.stream in streams else streams

    def output_grid(self, grids: dict[str, Grid]) -> dict[str, Grid]:
        return {**grids, self.made: grids[self.stream]} if self.stream in grids else grids
