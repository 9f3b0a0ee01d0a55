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
        self.owner = f"spatial_pool on {stream!r}"

    def adapt(self, tokens: Tokens, prompt: Prompt | None = None) -> Tokens:
        mask = squares(tokens.mask, self.factor, self.owner)  # (B, T, P', factor**2)
        x = squares(tokens.x.movedim(-1, 0), self.factor, self.owner).movedim(
            0, -1
        )  # (B, T, P', factor**2, D)
        return Tokens(masked_mean(x, mask, 3), mask.any(-1), tokens.span)  # (B, T, P', D)

    def grid(self, grid: Grid) -> Grid:
        return Grid(grid.span, squares(grid.mask, self.factor, self.owner).any(-1))


def squares(x: Tensor, factor: int, owner: str) -> Tensor:
    """Group the tokens of a step by squares: ``(..., P)`` -> ``(..., P / factor**2, factor**2)``.

    Args:
        x: anything with one entry a token of a square grid, row by row.
        factor: side of a square in tokens.
        owner: the adapter, for the message.

    Raises:
        ValueError: the tokens are no square grid whose side the factor divides.
    """
    side = math.isqrt(x.shape[-1])
    if side * side != x.shape[-1] or side % factor:
        raise ValueError(
            f"{owner}: {x.shape[-1]} tokens a step; "
            f"expected a square grid whose side {factor} divides"
        )
    n = side // factor
    grouped = x.reshape(*x.shape[:-1], n, factor, n, factor).movedim(-3, -2)
    return grouped.reshape(*x.shape[:-1], n * n, factor * factor)
