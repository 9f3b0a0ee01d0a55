"""Join two streams into one, one after the other."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from avllm.adapters.base import Adapter, Prompt
from avllm.tokens import Grid, Tokens


class Join(Adapter):
    """Put the steps of ``first`` before those of ``stream``, under the name of ``stream``.

    ``first`` is consumed. The purpose is a few tokens on the whole clip before one token a moment,
    as in Video-ChatGPT (arXiv 2306.05424), whose spatial tokens precede its temporal ones. Within
    the result starts must not go back in time, so ``first`` has to be tokens of whole clips.

    Args:
        stream: the stream that goes on.
        first: the stream whose steps go in front; of the same width.
    """

    def __init__(self, widths: dict[str, int], llm_dim: int, *, stream: str, first: str) -> None:
        super().__init__(widths, llm_dim)
        if self.require(first) != self.require(stream):
            raise ValueError(
                f"join: {first!r} has width {widths[first]} and {stream!r} {widths[stream]}; "
                "expected one width: project one of them before"
            )
        self.stream = stream
        self.first = first
        self.out_widths.pop(first)

    def forward(
        self, streams: dict[str, Tokens], prompt: Prompt | None = None
    ) -> dict[str, Tokens]:
        if self.stream not in streams:
            return streams
        parts = [streams[self.first], streams[self.stream]]
        most = max(part.mask.shape[2] for part in parts)  # P, the tokens a step
        x = torch.cat([_fill(part.x, most, 2) for part in parts], 1)  # (B, T1 + T2, P, D)
        mask = torch.cat([_fill(part.mask, most, 1) for part in parts], 1)  # (B, T1 + T2, P)
        span = torch.cat([part.span for part in parts], 1)  # (B, T1 + T2, 2)
        others = {name: tokens for name, tokens in streams.items() if name != self.first}
        return {**others, self.stream: Tokens(x, mask, span)}

    def output_grid(self, grids: dict[str, Grid]) -> dict[str, Grid]:
        if self.stream not in grids:
            return grids
        parts = [grids[self.first], grids[self.stream]]
        most = max(part.tokens for part in parts)
        span = torch.cat([part.span for part in parts])  # (T1 + T2, 2)
        mask = torch.cat([_fill(part.mask, most, 1) for part in parts])  # (T1 + T2, P)
        others = {name: grid for name, grid in grids.items() if name != self.first}
        return {**others, self.stream: Grid(span, mask)}


def _fill(x: torch.Tensor, tokens: int, place: int) -> torch.Tensor:
    """Pad the token dimension, ``place``-th from the end, with zeros (False) up to ``tokens``."""
    return pad(x, (0, 0) * (place - 1) + (0, tokens - x.shape[-place]))
