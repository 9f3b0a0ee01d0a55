"""Concatenate sight and sound of the same moment, synchronised as in FAVOR (arXiv 2310.05863)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

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
    """Put the tokens of several streams in the same windows of time side by side, as a new stream.

    A window in which a stream has no tokens gets that stream's learned vector for "absent", so that
    silence differs from missing sound. The streams themselves go on unchanged, or end here.

    Args:
        streams: what to put together, in this order.
        to: name of the new stream.
        seconds: length of a window.
        tokens: ``mean``: one token a window, the means side by side. ``keep``: the n-th token of
            each stream in the window side by side, as in FAVOR (section 3.1): its windows of half
            a second hold 32 tokens of a frame and 25 of sound, so that seven of the frame's have
            "absent" beside them.
        absent: ``learned``, or ``zeros`` as in FAVOR.
        consume: end the streams here, so that the LLM gets the new one alone (FAVOR, SALMONN).
    """

    def __init__(
        self,
        widths: dict[str, int],
        llm_dim: int,
        *,
        streams: list[str],
        to: str = "av",
        seconds: float = 0.25,
        tokens: str = "mean",
        absent: str = "learned",
        consume: bool = False,
    ) -> None:
        super().__init__(widths, llm_dim)
        if to in widths:
            raise ValueError(
                f"sync_concat has to {to!r}, a stream that exists already; expected a new name"
            )
        if seconds <= 0:
            raise ValueError(f"sync_concat has seconds {seconds}; expected more than 0")
        if tokens not in ("mean", "keep") or absent not in ("learned", "zeros"):
            raise ValueError(
                f"sync_concat has tokens {tokens!r} and absent {absent!r}; expected 'mean' or "
                "'keep', and 'learned' or 'zeros'"
            )
        self.streams = list(streams)
        self.keep = tokens == "keep"
        self.made = to  # not `self.to`, a method of torch's
        self.seconds = seconds
        self.consumed = set(streams) if consume else set()
        self.absent = nn.ParameterList()
        for stream in self.streams:
            width = self.require(stream)
            if absent == "learned":
                self.absent.append(nn.Parameter(torch.zeros(width)))
        self.out_widths = {n: w for n, w in self.out_widths.items() if n not in self.consumed}
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
        parts: dict[str, tuple[Tensor, Tensor]] = {}  # (B, W, K, D) and (B, W, K) of each stream
        for stream in self.streams:
            if stream in streams:
                parts[stream] = self._on_clock(streams[stream], clock)
        most = max(real.shape[2] for _, real in parts.values())
        sides: list[Tensor] = []  # (B, W, most, D) of each stream
        for number, stream in enumerate(self.streams):
            absent = present[0].x.new_zeros(self.in_widths[stream])
            if self.absent:
                absent = self.absent[number].to(absent.dtype)
            if stream in parts:
                sides.append(_filled(*parts[stream], most, absent))
            else:
                sides.append(absent.expand(*clock.real.shape, most, -1))
        reals = [pad(real, (0, most - real.shape[2])) for _, real in parts.values()]
        mask = torch.stack(reals).any(0)
        if not self.keep:  # a window of the clip in which no stream has tokens is one token, too
            mask = clock.real.unsqueeze(-1)
        others = {name: tokens for name, tokens in streams.items() if name not in self.consumed}
        return {**others, self.made: Tokens(torch.cat(sides, -1), mask, clock.span)}

    def output_grid(self, grids: dict[str, Grid]) -> dict[str, Grid]:
        present = [grids[stream] for stream in self.streams if stream in grids]
        if not present:
            return grids
        clock = self._clock(
            spans=[grid.span[None] for grid in present],
            reals=[grid.mask.any(-1)[None] for grid in present],
        )
        mask = clock.real[0].unsqueeze(-1)  # (W, 1)
        if self.keep:
            reals = [self._members(grid.span[None], grid.mask[None], clock)[1] for grid in present]
            most = max(real.shape[2] for real in reals)
            mask = torch.stack([pad(real[0], (0, most - real.shape[2])) for real in reals]).any(0)
        others = {name: grid for name, grid in grids.items() if name not in self.consumed}
        return {**others, self.made: Grid(clock.span[0], mask)}

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

    def _on_clock(self, tokens: Tokens, clock: _Clock) -> tuple[Tensor, Tensor]:
        """Return a stream's tokens in each window: ``(B, W, K, D)`` and ``(B, W, K)`` bool."""
        if self.keep:
            index, real = self._members(tokens.span, tokens.mask, clock)
            clips = torch.arange(len(index), device=index.device)[:, None, None]
            return tokens.flat()[0][clips, index], real
        b, w = clock.real.shape
        owner = self._owner(tokens.span, w)
        there = tokens.mask.any(-1)  # (B, T)
        step = masked_mean(tokens.x, tokens.mask, 2) * there.unsqueeze(-1)  # (B, T, D)
        total = step.new_zeros(b, w, step.shape[-1])
        total = total.scatter_add(1, owner.unsqueeze(-1).expand_as(step), step)
        count = step.new_zeros(b, w).scatter_add(1, owner, there.to(step.dtype))
        mean = total / count.clamp(min=1).unsqueeze(-1)
        return mean.unsqueeze(2), (count > 0).unsqueeze(2)

    def _owner(self, span: Tensor, windows: int) -> Tensor:
        """Return the window in which the centre of each step lies, ``(B, T)`` long."""
        window = (span.mean(-1) / self.seconds + 1e-4).floor()  # (B, T)
        return window.long().clamp(0, windows - 1)

    def _members(self, span: Tensor, mask: Tensor, clock: _Clock) -> tuple[Tensor, Tensor]:
        """List the real tokens of each window in order of time.

        Args:
            span: ``(B, T, 2)`` seconds.
            mask: ``(B, T, P)`` bool.
            clock: the windows.

        Returns:
            ``(B, W, K)`` long, places among the stream's T * P tokens, and ``(B, W, K)`` bool.
        """
        windows, tokens = clock.real.shape[1], mask.shape[2]
        owner = self._owner(span, windows).repeat_interleave(tokens, 1)  # (B, T * P)
        number = torch.arange(windows, device=span.device)[:, None]  # (W, 1)
        member = (owner[:, None] == number) & mask.flatten(1)[:, None]  # (B, W, T * P)
        most = max(1, int(member.sum(-1).max()))
        # A stable sort of "no member" puts the window's tokens first, in their order.
        index = (~member).to(torch.uint8).argsort(dim=-1, stable=True)[..., :most]
        return index, member.gather(-1, index)


def _filled(x: Tensor, real: Tensor, most: int, absent: Tensor) -> Tensor:
    """Put ``absent (D,)`` where no token is: ``(B, W, K, D)`` -> ``(B, W, most, D)``."""
    missing = most - real.shape[2]
    x = pad(x, (0, 0, 0, missing))
    return torch.where(pad(real, (0, missing)).unsqueeze(-1), x, absent)
