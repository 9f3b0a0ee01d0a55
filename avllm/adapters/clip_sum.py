"""Sum up a clip's steps (Deep Sets, arXiv 1703.06114): how often something happens, and when."""

from __future__ import annotations

import torch
from torch import nn

from avllm.adapters.base import Prompt, StreamAdapter, sinusoids, whole_span
from avllm.tokens import Grid, Tokens


class ClipSum(StreamAdapter):
    """Sum a perceptron's output over all real tokens of a clip, to ``num_tokens`` tokens a clip.

    Sums count: the gradient of a sum reaches every step directly, whereas attention over a sequence
    learns to count late. ``moments`` more tokens say when something happens: attention over the
    steps averages the sinusoids of their seconds (arXiv 1706.03762, section 3.5). Its weights sum
    to one, so that a moment does not depend on the number of steps.

    Args:
        stream: the stream to sum up.
        num_tokens: tokens that each clip becomes, besides the moments.
        moments: tokens that hold when something happens.
        dim: their width; None keeps the stream's.
        hidden: width inside the perceptron.
        scale: factor on the sums, about one over the number of steps that something lasts.
        shortest, longest: periods in seconds of the moments' fastest and slowest sinusoid.
    """

    def __init__(
        self,
        widths: dict[str, int],
        llm_dim: int,
        *,
        stream: str,
        num_tokens: int = 4,
        moments: int = 0,
        dim: int | None = None,
        hidden: int | None = None,
        scale: float = 0.125,
        shortest: float = 0.25,
        longest: float = 20.0,
    ) -> None:
        super().__init__(widths, llm_dim, stream)
        if num_tokens < 0 or moments < 0 or num_tokens + moments < 1:
            raise ValueError(
                f"clip_sum on {stream!r} has num_tokens {num_tokens} and moments {moments}; "
                "expected at least 1 in all"
            )
        self.dim = dim or self.in_dim
        hidden = hidden or 2 * self.in_dim
        self.num_tokens = num_tokens
        self.moments = moments
        self.scale = scale
        self.shortest = shortest
        self.longest = longest
        self.layers = nn.Sequential(
            nn.LayerNorm(self.in_dim), nn.Linear(self.in_dim, hidden), nn.GELU()
        )
        self.sums = nn.Linear(hidden, num_tokens * self.dim)
        if moments:
            self.moment_scores = nn.Linear(hidden, moments)
        self.set_out_dim(self.dim)

    def adapt(self, tokens: Tokens, prompt: Prompt | None = None) -> Tokens:
        x, keep = tokens.flat()  # (B, N, D), (B, N)
        hidden = self.layers(x)  # (B, N, H)
        total = (self.sums(hidden) * keep.unsqueeze(-1)).sum(1) * self.scale  # (B, K * D')
        parts = [total.unflatten(1, (self.num_tokens, self.dim))]
        if self.moments:
            scores = self.moment_scores(hidden).float().masked_fill(~keep.unsqueeze(-1), -1e9)
            weights = scores.softmax(1)  # (B, N, M)
            at = tokens.span.mean(-1).repeat_interleave(tokens.x.shape[2], 1)  # (B, N)
            when = sinusoids(at, self.dim, self.shortest, self.longest)  # (B, N, D')
            parts.append((weights.mT @ when).to(total.dtype))
        real = tokens.mask.any(-1)  # (B, T)
        return Tokens(
            torch.cat(parts, 1).unsqueeze(1),  # (B, 1, K + M, D')
            real.any(1)[:, None, None].expand(-1, 1, self.num_tokens + self.moments),
            whole_span(tokens.span, real),
        )

    def grid(self, grid: Grid) -> Grid:
        real = grid.mask.any(-1)
        span = whole_span(grid.span[None], real[None])[0]
        return Grid(span, real.any()[None, None].expand(1, self.num_tokens + self.moments))
