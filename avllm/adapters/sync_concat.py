"""Concatenate sight and sound of the same moment, synchronised as in FAVOR (arXiv 2310.05863)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from avllm.adapters.base import Adapter, Prompt, masked_mean
from avllm.tokens import Grid, Tokens


@dataclass(frozen=True)
class _Clock:
    """Hold the windows of time that all streams of a clip share.

    Attributes:
        span: ``(B, W, 2)`` seconds.
        real: ``(B, W)`` bool.
    """

    span: Tensor
    real: Tensor


class SyncConcat(Adapter):
    """Average streams over the same windows of time and concatenate the averages to a new stream.

    A window in which a stream has no tokens gets that stream's learned vector for "absent", so that
    silence differs from missing sound. The streams themselves go on unchanged.

    Args:
        streams: what to put together, in this order.
        to: name of the new stream.
        seconds: length of a window.
    """

    def __init__(
        self,
        widths: dict[str, int],
        llm_dim: int,
        *,
        streams: list[str],
        to: str = "av",
        seconds: float = 0.25,
    ) -> None:
        super().__init__(widths, llm_dim)
        if to in widths:
            raise ValueError(
                f"sync_concat has to {to!r}, a stream that exists already; expected a new name"
            )
        if seconds <= 0:
            raise ValueError(f"sync_concat has seconds {seconds}; expected more than 0")
        self.streams = list(streams)
        self.made = to  # not `self.to`, a method of torch's
        self.seconds = seconds
        absent = [nn.Parameter(torch.zeros(self.require(stream))) for stream in self.streams]
        self.absent = nn.ParameterList(absent)
        self.out_widths[to] = sum(widths[stream] for stream in self.streams)

    def forward(
        self, streams: dict[str, Tokens], prompt: Prompt | None = None
    ) -> dict[str, Tokens]:
        present = [streams[stream] for stream in self.streams if stream in streams]
        if not present:
            return streams
        clock = self._clock(
            spans=[tokens.span for tokens in present],
            reals=[tokens.mask.any(-1) for tokens in present],
        )
        parts: list[Tensor] = []  # (B, W, D) of each stream
        for stream, absent in zip(self.streams, self.absent, strict=True):
            if stream in streams:
                part = self._on_clock(streams[stream], clock, absent)
            else:
                part = absent.expand(*clock.real.shape, -1)
            parts.append(part.to(present[0].x.dtype))
        x = torch.cat(parts, -1).unsqueeze(2)  # (B, W, 1, D)
        return {**streams, self.made: Tokens(x, clock.real.unsqueeze(-1), clock.span)}

    def output_grid(self, grids: dict[str, Grid]) -> dict[str, Grid]:
        present = [grids[stream] for stream in self.streams if stream in grids]
        if not present:
            return grids
        clock = self._clock(
            spans=[grid.span[None] for grid in present],
            reals=[grid.mask.any(-1)[None] for grid in present],
        )
        return {**grids, self.made: Grid(clock.span[0], clock.real[0].unsqueeze(-1))}

    def _clock(self, spans: list[Tensor], reals: list[Tensor]) -> _Clock:
        """Return the windows from second 0 to the last end of any stream.

        Args:
            spans: ``(B, T, 2)`` seconds of each stream.
            reals: ``(B, T)`` bool of each stream, the steps that exist. A clip of which no stream
                has any gets no real window.
        """
        ends: list[Tensor] = []  # (B,) of each stream
        for span, real in zip(spans, reals, strict=True):
            ends.append(torch.where(real, span[..., 1], 0.0).amax(1))
        end = torch.stack(ends).amax(0)
        exists = torch.stack([real.any(1) for real in reals]).any(0)  # (B,)
        count = ((end - 1e-4) / self.seconds).ceil().clamp(min=1)  # (B,)
        number = torch.arange(int(count.max()), device=end.device)  # (W,)
        low = (self.seconds * number).expand(len(end), -1)  # (B, W)
        span = torch.stack([low, low + self.seconds], -1).minimum(end[:, None, None])
        return _Clock(span, (number < count[:, None]) & exists[:, None])

    def _on_clock(self, tokens: Tokens, clock: _Clock, absent: Tensor) -> Tensor:
        """Average the tokens with their centre in a window, ``(B, T, P, D)`` -> ``(B, W, D)``."""
        b, w = clock.real.shape
        window = (tokens.span.mean(-1) / self.seconds + 1e-4).floor()  # (B, T)
        owner = window.long().clamp(0, w - 1)
        real = tokens.mask.any(-1)  # (B, T)
        step = masked_mean(tokens.x, tokens.mask, 2) * real.unsqueeze(-1)  # (B, T, D)
        total = step.new_zeros(b, w, step.shape[-1])
        total = total.scatter_add(1, owner.unsqueeze(-1).expand_as(step), step)
        count = step.new_zeros(b, w).scatter_add(1, owner, real.to(step.dtype))
        mean = total / count.clamp(min=1).unsqueeze(-1)
        return torch.where((count > 0).unsqueeze(-1), mean, absent.to(mean.dtype))
