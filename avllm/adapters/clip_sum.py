"""A clip as a sum over its steps: counts, and sums of moments, without attention (Deep Sets, arXiv 1703.06114)."""

from __future__ import annotations

from torch import nn

from avllm.adapters.base import Prompt, StreamAdapter, whole_span
from avllm.tokens import Grid, Tokens


class ClipSum(StreamAdapter):
    """``num_tokens`` tokens a clip, each the sum over all real tokens of a perceptron's output.

    How often something happens is a sum of detections: its gradient reaches every step directly, where attention over
    a sequence learns to count late. Put a ``position`` before it and the sums also tell when.

    Args:
        stream: the stream to sum up.
        num_tokens: tokens that each clip becomes.
        dim: their width; None keeps the stream's.
        hidden: width inside the perceptron.
        scale: factor on the sums, about one over the number of steps that something lasts.
    """

    def __init__(
        self,
        widths: dict[str, int],
        llm_dim: int,
        *,
        stream: str,
        num_tokens: int = 4,
        dim: int | None = None,
        hidden: int | None = None,
        scale: float = 0.125,
    ) -> None:
        super().__init__(widths, llm_dim, stream)
        if num_tokens < 1:
            raise ValueError(f"clip_sum on {stream!r} has num_tokens {num_tokens}; expected at least 1")
        dim = dim or self.in_dim
        hidden = hidden or 2 * self.in_dim
        self.num_tokens, self.scale = num_tokens, scale
        self.layers = nn.Sequential(
            nn.LayerNorm(self.in_dim), nn.Linear(self.in_dim, hidden), nn.GELU(), nn.Linear(hidden, num_tokens * dim)
        )
        self.set_out_dim(dim)

    def adapt(self, tokens: Tokens, prompt: Prompt | None = None) -> Tokens:
        x, keep = tokens.flat()  # (B, N, D), (B, N)
        total = (self.layers(x) * keep.unsqueeze(-1)).sum(1) * self.scale  # (B, K*D')
        real = tokens.mask.any(-1)  # (B, T)
        return Tokens(
            total.unflatten(1, (self.num_tokens, -1)).unsqueeze(1),  # (B, 1, K, D')
            real.any(1)[:, None, None].expand(-1, 1, self.num_tokens),
            whole_span(tokens.span, real),
        )

    def grid(self, grid: Grid) -> Grid:
        real = grid.mask.any(-1)
        span = whole_span(grid.span[None], real[None])[0]
        return Grid(span, real.any()[None, None].expand(1, self.num_tokens))
