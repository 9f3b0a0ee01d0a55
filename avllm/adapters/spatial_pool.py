"""Make the grid of patches coarser: average squares of tokens into one."""

from __future__ import annotations

import math

from torch import Tensor

from avllm.adapters.base import Prompt, StreamAdapter, masked_mean
from avllm.tokens import Grid, Tokens


class SpatialPool(StreamAdapter):
    """Average squares of ``factor`` x ``factor`` tokens of a square grid.

    The tokens of the grid come row by row, as vision transformers give them.

    Args:
        stream: the stream to pool.
        factor: side of a square in tokens; has to divide the grid's side.
    """

    def __init__(
        self, widths: dict[str, int], llm_dim: int, *, stream: str, factor: int = 2
    ) -> None:
        super().__init__(widths, llm_dim, stream)
        if factor < 1:
            raise ValueError(f"spatial_pool on {stream!r} has factor {factor}; expected 1 or more")
        self.factor = factor

    def adapt(self, tokens: Tokens, prompt: Prompt | None = None) -> Tokens:
        mask = self._squares(tokens.mask)  # (B, T, P', factor**2)
        x = self._squares(tokens.x.movedim(-1, 0)).movedim(0, -1)  # (B, T, P', factor**2, D)
        return Tokens(masked_mean(x, mask, 3), mask.any(-1), tokens.span)  # (B, T, P', D)

    def grid(self, grid: Grid) -> Grid:
        return Grid(grid.span, self._squares(grid.mask).any(-1))

    def _squares(self, x: Tensor) -> Tensor:
        """Group tokens by squares: ``(..., P)`` -> ``(..., P / factor**2, factor**2)``."""
        side = math.isqrt(x.shape[-1])
        f = self.factor
        if side * side != x.shape[-1] or side % f:
            raise ValueError(
                f"spatial_pool on {self.stream!r}: {x.shape[-1]} tokens a step; "
                f"expected a square grid whose side {f} divides"
            )
        n = side // f
        squares = x.reshape(*x.shape[:-1], n, f, n, f).movedim(-3, -2)  # (..., n, n, f, f)
        return squares.reshape(*x.shape[:-1], n * n, f * f)
