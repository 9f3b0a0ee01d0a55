"""Merge tokens that look alike: token merging (ToMe, arXiv 2210.09461) down to a bound."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from avllm.adapters.base import Prompt, StreamAdapter, whole_span
from avllm.tokens import Grid, Tokens


class TokenMerge(StreamAdapter):
    """Merge the most similar tokens of a clip until at most ``most`` are left, or none are alike.

    As in ToMe, the tokens are divided into two halves, each token of the first finds the most
    similar one of the second, and the most similar pairs become their mean, weighted by how many
    tokens each stands for. This repeats. A still clip so becomes few tokens, a lively one up to
    ``most``: content decides, so that the loader knows an upper bound alone. There are no weights
    to train.

    Args:
        stream: the stream to merge; its times are given up: the tokens span the clip.
        most: the largest number of tokens that a clip becomes.
        alike: pairs with a cosine of more than this are merged even where fewer than ``most`` are
            left; 1: none are.
    """

    by_content = True

    def __init__(
        self,
        widths: dict[str, int],
        llm_dim: int,
        *,
        stream: str,
        most: int = 64,
        alike: float = 0.95,
    ) -> None:
        super().__init__(widths, llm_dim, stream)
        if most < 1 or not -1 <= alike <= 1:
            raise ValueError(
                f"token_merge on {stream!r} has most {most} and alike {alike}; "
                "expected 1 or more, and a cosine from -1 to 1"
            )
        self.most = most
        self.alike = alike

    def adapt(self, tokens: Tokens, prompt: Prompt | None = None) -> Tokens:
        x, real = tokens.flat()
        bounds = real.sum(1).clamp(max=self.most)  # (B,) the places that the loader reserved
        width = max(1, int(bounds.max()))
        out = x.new_zeros(len(x), width, x.shape[-1])
        mask = real.new_zeros(len(x), width)
        for clip, bound in enumerate(bounds.tolist()):
            merged = self.merge(x[clip][real[clip]])  # (n, D)
            # Places without a token come first.
            out[clip, bound - len(merged) : bound] = merged
            mask[clip, bound - len(merged) : bound] = True
        places = torch.arange(width, device=real.device) < bounds[:, None]  # (B, width)
        extra = {"places": places[:, None]}
        span = whole_span(tokens.span, tokens.mask.any(-1))
        return Tokens(out[:, None], mask[:, None], span, extra)

    def grid(self, grid: Grid) -> Grid:
        count = min(self.most, int(grid.mask.sum()))
        span = whole_span(grid.span[None], grid.mask.any(-1)[None])[0]
        mask = torch.ones(1, count, dtype=torch.bool)
        return Grid(span, mask, at_most=True)

    def merge(self, x: Tensor) -> Tensor:
        """Merge the tokens of one clip, ``(N, D)`` -> ``(n, D)`` in order of their first parts."""
        dtype = x.dtype
        x = x.float()  # half precision counts to 256 and finds cosines above 1
        stands_for = x.new_ones(len(x))
        while len(x) > 1:
            first, second = x[::2], x[1::2]
            cosine = normalize(first.detach(), dim=-1) @ normalize(second.detach(), dim=-1).T
            cosine = cosine.clamp(max=1.0)  # rounding may exceed it
            best, partner = cosine.max(1)  # (A,), (A,)
            surplus = max(0, len(x) - self.most)
            number = min(len(first), max(surplus, int((best > self.alike).sum())))
            if number == 0:
                break
            chosen = best.argsort(descending=True, stable=True)[:number]
            # Each token goes to its own place, a merged one to its partner's.
            place = torch.arange(len(x), device=x.device)
            place[2 * chosen] = 2 * partner[chosen] + 1
            kept, place = place.unique(return_inverse=True)
            weight = x.new_zeros(len(kept)).index_add(0, place, stands_for)
            total = x.new_zeros(len(kept), x.shape[1])
            total = total.index_add(0, place, x * stands_for[:, None])
            x, stands_for = total / weight[:, None], weight
        return x.to(dtype)
