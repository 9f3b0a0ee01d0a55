"""Sight and sound of the same moment in one vector: the synchronised concatenation of FAVOR (arXiv 2310.05863)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from avllm.adapters.base import Adapter, Prompt, masked_mean
from avllm.tokens import Grid, Tokens


@dataclass(frozen=True)
class _Clock:
    """Windows of a clip's time that all its streams share: span ``(B, W, 2)``, real ``(B, W)``."""

    span: Tensor
    real: Tensor


class SyncConcat(Adapter):
    """Average each stream over the same windows of time and put the averages side by side, as a new stream.

    A window in which a stream has nothing holds that stream's learned vector for "absent", so that silence that was
    heard and sound that is not there are two things. The streams themselves go on unchanged.

    Args:
        streams: what to put together, in this order.
        to: name of the new stream.
        seconds: length of a window.
    """

    def __init__(
        self, widths: dict[str, int], llm_dim: int, *, streams: list[str], to: str = "av", seconds: float = 0.25
    ) -> None:
        super().__init__(widths, llm_dim)
        if to in widths:
            raise ValueError(f"sync_concat cannot make {to!r}: a stream of that name is there already")
        if seconds <= 0:
            raise ValueError(f"sync_concat has seconds {seconds}; expected more than 0")
        self.streams, self.made, self.seconds = list(streams), to, seconds  # `to` is torch's
        self.absent = nn.ParameterList(nn.Parameter(torch.zeros(self.require(s))) for s in self.streams)
        self.out_widths[to] = sum(widths[s] for s in self.streams)

    def forward(self, streams: dict[str, Tokens], prompt: Prompt | None = None) -> dict[str, Tokens]:
        here = [streams[s] for s in self.streams if s in streams]
        if not here:
            return streams
        clock = self._clock([(t.span, t.mask.any(-1)) for t in here])
        parts = [
            self._on_clock(streams[s], clock, absent) if s in streams else absent.expand(*clock.real.shape, -1)
            for s, absent in zip(self.streams, self.absent, strict=True)
        ]
        x = torch.cat([p.to(here[0].x.dtype) for p in parts], -1).unsqueeze(2)  # (B, W, 1, D)
        return {**streams, self.made: Tokens(x, clock.real.unsqueeze(-1), clock.span)}

    def output_grid(self, grids: dict[str, Grid]) -> dict[str, Grid]:
        here = [grids[s] for s in self.streams if s in grids]
        if not here:
            return grids
        clock = self._clock([(g.span[None], g.mask.any(-1)[None]) for g in here])
        return {**grids, self.made: Grid(clock.span[0], clock.real[0].unsqueeze(-1))}

    def _clock(self, clocks: list[tuple[Tensor, Tensor]]) -> _Clock:
        """Windows from second 0 to the last end of any stream; a clip without any of them has none that is real."""
        ends = [torch.where(real, span[..., 1], 0.0).amax(1) for span, real in clocks]  # (B,) each
        end = torch.stack(ends).amax(0)
        there = torch.stack([real.any(1) for _, real in clocks]).any(0)  # (B,)
        count = ((end - 1e-4) / self.seconds).ceil().clamp(min=1)  # (B,)
        number = torch.arange(int(count.max()), device=end.device)  # (W,)
        low = (self.seconds * number).expand(len(end), -1)  # (B, W)
        span = torch.stack([low, low + self.seconds], -1).minimum(end[:, None, None])
        return _Clock(span, (number < count[:, None]) & there[:, None])

    def _on_clock(self, tokens: Tokens, clock: _Clock, absent: Tensor) -> Tensor:
        """``(B, T, P, D)`` -> ``(B, W, D)``: the mean of the real tokens whose centre lies in each window."""
        b, w = clock.real.shape
        owner = (tokens.span.mean(-1) / self.seconds + 1e-4).floor().long().clamp(0, w - 1)  # (B, T)
        real = tokens.mask.any(-1)  # (B, T)
        step = masked_mean(tokens.x, tokens.mask, 2) * real.unsqueeze(-1)  # (B, T, D)
        total = step.new_zeros(b, w, step.shape[-1])
        total = total.scatter_add(1, owner.unsqueeze(-1).expand_as(step), step)
        count = step.new_zeros(b, w).scatter_add(1, owner, real.to(step.dtype))
        mean = total / count.clamp(min=1).unsqueeze(-1)
        return torch.where((count > 0).unsqueeze(-1), mean, absent.to(mean.dtype))
