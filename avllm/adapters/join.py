"""Two readings of one stream put back into one, one behind the other."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from avllm.adapters.base import Adapter, Prompt
from avllm.tokens import Grid, Tokens


class Join(Adapter):
    """Steps of ``first``, then those of ``stream``, under the name of ``stream``; ``first`` is consumed.

    Meant for a few tokens on the whole clip before one token a moment, as in Video-ChatGPT (arXiv 2306.05424), whose
    spatial tokens stand before its temporal ones. Within the result starts must not go back in time: ``first`` has to
    be tokens of whole clips.

    Args:
        stream: the stream that goes on.
        first: the stream whose steps go in front; of the same width.
    """

    def __init__(self, widths: dict[str, int], llm_dim: int, *, stream: str, first: str) -> None:
        super().__init__(widths, llm_dim)
        if self.require(first) != self.require(stream):
            raise ValueError(
                f"join: {first!r} is {widths[first]} wide and {stream!r} {widths[stream]}; bring both to one width"
            )
        self.stream, self.first = stream, first
        self.out_widths.pop(first)

    def forward(self, streams: dict[str, Tokens], prompt: Prompt | None = None) -> dict[str, Tokens]:
        if self.stream not in streams:
            return streams
        parts = [streams[self.first], streams[self.stream]]
        most = max(part.mask.shape[2] for part in parts)
        wide = [Tokens(_fill(p.x, most, 2), _fill(p.mask, most, 1), p.span) for p in parts]
        x = torch.cat([p.x for p in wide], 1)  # (B, T1 + T2 + ..., P, D)
        joined = Tokens(x, torch.cat([p.mask for p in wide], 1), torch.cat([p.span for p in wide], 1))
        return {**{k: v for k, v in streams.items() if k != self.first}, self.stream: joined}

    def output_grid(self, grids: dict[str, Grid]) -> dict[str, Grid]:
        if self.stream not in grids:
            return grids
        parts = [grids[self.first], grids[self.stream]]
        most = max(part.tokens for part in parts)
        joined = Grid(torch.cat([p.span for p in parts]), torch.cat([_fill(p.mask, most, 1) for p in parts]))
        return {**{k: v for k, v in grids.items() if k != self.first}, self.stream: joined}


def _fill(x: torch.Tensor, tokens: int, place: int) -> torch.Tensor:
    """Pad the token dimension, the ``place``-th from the end, with zeros (False) up to ``tokens``."""
    return pad(x, (0, 0) * (place - 1) + (0, tokens - x.shape[-place]))
