"""Put the i-th tokens of several streams side by side, as SALMONN (arXiv 2310.13289) does."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from avllm.adapters.base import Adapter, Prompt
from avllm.tokens import Grid, Tokens


@dataclass(frozen=True)
class _Line:
    """The tokens of a stream in a row.

    Attributes:
        span: ``(B, N, 2)`` seconds; the tokens of a step share it evenly.
        mask: ``(B, N)`` bool.
    """

    span: Tensor
    mask: Tensor


class StepConcat(Adapter):
    """Concatenate streams whose encoders hear the same sound at the same rate, token by token.

    A stream that is shorter goes on with zeros, and so does one that a clip lacks. The result takes
    the name of the first stream; the others are consumed. With one stream it is a norm alone.

    Args:
        streams: what to put together, in this order.
        norm: LayerNorm on each stream before.
    """

    def __init__(
        self, widths: dict[str, int], llm_dim: int, *, streams: list[str], norm: bool = True
    ) -> None:
        super().__init__(widths, llm_dim)
        if not streams or len(set(streams)) < len(streams):
            raise ValueError(f"step_concat has streams {streams}; expected one or more, each once")
        self.streams = list(streams)
        self.made = self.streams[0]
        norms = [nn.LayerNorm(self.require(s)) if norm else nn.Identity() for s in self.streams]
        self.norms = nn.ModuleList(norms)
        for stream in self.streams:
            self.require(stream)
            self.out_widths.pop(stream)
        self.out_widths[self.made] = sum(widths[stream] for stream in self.streams)

    def forward(
        self, streams: dict[str, Tokens], prompt: Prompt | None = None
    ) -> dict[str, Tokens]:
        present = [streams[stream] for stream in self.streams if stream in streams]
        if not present:
            return streams
        joint = _join([_line(tokens.span, tokens.mask) for tokens in present])
        parts: list[Tensor] = []  # (B, N, D) of each stream
        for stream, norm in zip(self.streams, self.norms, strict=True):
            if stream in streams:
                parts.append(_put_in_row(streams[stream], norm, joint.mask.shape[1]))
            else:
                width = self.in_widths[stream]
                parts.append(present[0].x.new_zeros(*joint.mask.shape, width))
        x = torch.cat(parts, -1).unsqueeze(2)  # (B, N, 1, D)
        others = {name: tokens for name, tokens in streams.items() if name not in self.streams}
        return {**others, self.made: Tokens(x, joint.mask.unsqueeze(-1), joint.span)}

    def output_grid(self, grids: dict[str, Grid]) -> dict[str, Grid]:
        present = [grids[stream] for stream in self.streams if stream in grids]
        if not present:
            return grids
        joint = _join([_line(grid.span[None], grid.mask[None]) for grid in present])
        others = {name: grid for name, grid in grids.items() if name not in self.streams}
        return {**others, self.made: Grid(joint.span[0], joint.mask[0].unsqueeze(-1))}


def _put_in_row(tokens: Tokens, norm: nn.Module, length: int) -> Tensor:
    """Return the normed tokens in a row, zero where there is none, ``(B, length, D)``."""
    x = norm(tokens.x).flatten(1, 2)  # (B, T * P, D)
    x = x * tokens.mask.flatten(1).unsqueeze(-1)
    return pad(x, (0, 0, 0, length - x.shape[1]))


def _line(span: Tensor, mask: Tensor) -> _Line:
    """Put the tokens of steps ``(B, T, 2)``, ``(B, T, P)`` in a row."""
    p = mask.shape[2]
    share = torch.arange(p + 1, device=span.device, dtype=span.dtype) / p  # (P + 1,)
    edges = span[..., :1] + (span[..., 1:] - span[..., :1]) * share  # (B, T, P + 1)
    spans = torch.stack([edges[..., :-1], edges[..., 1:]], -1)  # (B, T, P, 2)
    return _Line(spans.flatten(1, 2), mask.flatten(1))


def _join(lines: list[_Line]) -> _Line:
    """Return the places that any stream has a token in, with the clock of the first that has."""
    length = max(line.mask.shape[1] for line in lines)
    span = torch.zeros_like(lines[0].span[:, :1]).expand(-1, length, -1)  # (B, N, 2)
    mask = torch.zeros_like(lines[0].mask[:, :1]).expand(-1, length)  # (B, N)
    for line in lines:
        missing = length - line.mask.shape[1]
        real = pad(line.mask, (0, missing))
        spans = pad(line.span, (0, 0, 0, missing))
        span = torch.where((real & ~mask).unsqueeze(-1), spans, span)
        mask = mask | real
    return _Line(span, mask)
