"""Pool steps over time, or the tokens of a step, by masked averages or maxima."""

from __future__ import annotations

import torch
from torch import Tensor

from avllm.adapters.base import (
    Prompt,
    StreamAdapter,
    Windows,
    gather_steps,
    masked_mean,
    time_windows,
    window_grid,
    window_sums,
)
from avllm.tokens import Grid, Tokens


class TemporalPool(StreamAdapter):
    """Average over time, over the tokens of a step, or both; masked tokens take no part.

    Args:
        stream: the stream to pool.
        seconds: one step for each window of so many seconds; None keeps the steps.
        tokens: ``keep`` the tokens of a step (of a window: those of its steps, averaged place by
            place) or ``mean`` for one token a step.
        reduce: ``mean`` of a window's steps, or ``max``: the largest value of each feature, so that
            what lasts a moment is not averaged away by the rest of the clip. Put a ``linear``
            before it, which learns the features to take the maximum of.
    """

    def __init__(
        self,
        widths: dict[str, int],
        llm_dim: int,
        *,
        stream: str,
        seconds: float | None = None,
        tokens: str = "keep",
        reduce: str = "mean",
    ) -> None:
        super().__init__(widths, llm_dim, stream)
        if tokens not in ("keep", "mean"):
            raise ValueError(
                f"temporal_pool on {stream!r} has tokens {tokens!r}; expected 'keep' or 'mean'"
            )
        if seconds is not None and seconds <= 0:
            raise ValueError(
                f"temporal_pool on {stream!r} has seconds {seconds}; expected more than 0"
            )
        if reduce not in ("mean", "max"):
            raise ValueError(
                f"temporal_pool on {stream!r} has reduce {reduce!r}; expected 'mean' or 'max'"
            )
        if reduce == "max" and seconds is None:
            raise ValueError(
                f"temporal_pool on {stream!r} has reduce 'max' and no seconds; "
                "expected the length of a window"
            )
        self.seconds = seconds
        self.tokens = tokens
        self.reduce = reduce

    def adapt(self, tokens: Tokens, prompt: Prompt | None = None) -> Tokens:
        if self.tokens == "mean":
            mask = tokens.mask.any(-1, keepdim=True)  # (B, T, 1)
            x = masked_mean(tokens.x, tokens.mask, 2).unsqueeze(2)  # (B, T, 1, D)
            tokens = Tokens(x, mask, tokens.span)
        if self.seconds is None:
            return tokens
        windows = time_windows(tokens.span, tokens.mask.any(-1), self.seconds)
        if self.reduce == "max":
            return window_maxima(tokens, windows)
        x, count = window_sums(tokens, windows)  # (B, W, P, D), (B, W, P)
        return Tokens(x / count.clamp(min=1).unsqueeze(-1), count > 0, windows.span)

    def grid(self, grid: Grid) -> Grid:
        if self.tokens == "mean":
            grid = Grid(grid.span, grid.mask.any(-1, keepdim=True))
        if self.seconds is None:
            return grid
        windows, keep = window_grid(grid, self.seconds)
        return Grid(windows.span[0], keep.any(1))


def window_maxima(tokens: Tokens, windows: Windows) -> Tokens:
    """Return the largest value of each feature in each window, place by place: ``(B, W, P, D)``.

    Only real tokens count; it is zero where a window has none.
    """
    if windows.index.shape[1] == 1:  # one window takes all steps: no copy is needed
        x = tokens.x[:, None]  # (B, 1, T, P, D)
        keep = tokens.mask[:, None]  # (B, 1, T, P)
    else:
        x, keep = gather_steps(tokens, windows)  # (B, W, K, P, D), (B, W, K, P)
    x = x.masked_fill(~keep.unsqueeze(-1), -torch.inf)
    x = x.max(2).values  # (B, W, P, D); the backward pass of amax is much slower
    mask: Tensor = keep.any(2)  # (B, W, P)
    return Tokens(x.masked_fill(~mask.unsqueeze(-1), 0.0), mask, windows.span)
