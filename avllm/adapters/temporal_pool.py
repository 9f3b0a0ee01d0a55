"""Fewer steps or fewer tokens by masked averaging, on the clip's own clock."""

from __future__ import annotations

from avllm.adapters.base import Prompt, StreamAdapter, masked_mean, time_windows, window_grid, window_sums
from avllm.tokens import Grid, Tokens


class TemporalPool(StreamAdapter):
    """Average over time, over the tokens of a step, or both; masked tokens take no part.

    Args:
        stream: the stream to pool.
        seconds: one step for each window of so many seconds; None keeps the steps.
        tokens: ``keep`` the tokens of a step (of a window: those of its steps, averaged place by place) or ``mean`` for
            one token a step.
    """

    def __init__(
        self, widths: dict[str, int], llm_dim: int, *, stream: str, seconds: float | None = None, tokens: str = "keep"
    ) -> None:
        super().__init__(widths, llm_dim, stream)
        if tokens not in ("keep", "mean"):
            raise ValueError(f"temporal_pool on {stream!r} has tokens {tokens!r}; expected 'keep' or 'mean'")
        if seconds is not None and seconds <= 0:
            raise ValueError(f"temporal_pool on {stream!r} has seconds {seconds}; expected more than 0")
        self.seconds, self.tokens = seconds, tokens

    def adapt(self, tokens: Tokens, prompt: Prompt | None = None) -> Tokens:
        if self.tokens == "mean":
            mask = tokens.mask.any(-1, keepdim=True)  # (B, T, 1)
            tokens = Tokens(masked_mean(tokens.x, tokens.mask, 2).unsqueeze(2), mask, tokens.span)  # (B, T, 1, D)
        if self.seconds is None:
            return tokens
        windows = time_windows(tokens.span, tokens.mask.any(-1), self.seconds)
        x, count = window_sums(tokens, windows)  # (B, W, P, D), (B, W, P)
        return Tokens(x / count.clamp(min=1).unsqueeze(-1), count > 0, windows.span)

    def grid(self, grid: Grid) -> Grid:
        if self.tokens == "mean":
            grid = Grid(grid.span, grid.mask.any(-1, keepdim=True))
        if self.seconds is None:
            return grid
        windows, keep = window_grid(grid, self.seconds)
        return Grid(windows.span[0], keep.any(1))
