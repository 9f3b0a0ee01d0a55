"""See all moments coarsely and a few finely: LITA's SlowFast tokens (arXiv 2403.19046, 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from avllm.adapters.base import Adapter, Prompt, masked_mean
from avllm.adapters.spatial_pool import squares
from avllm.tokens import Grid, Tokens


class SlowFastTokens(Adapter):
    """Make one token of each frame (fast), and pooled patches of a few frames (slow).

    LITA samples 100 frames and takes ``pool: 2``: 100 fast tokens and 4 frames of 64 slow ones
    (of 256 patches), 356 instead of 25,600. The fast tokens keep the stream's name and come first
    in the layout ``concat``.

    Args:
        stream: the stream to read; its steps hold a square grid of patches.
        to: name of the slow stream, such as ``video_slow``.
        pool: side s of the squares of patches that become one slow token.
        frames: number of slow frames, evenly spaced; None: ``pool`` squared, so that the slow
            tokens are as many as one frame has patches.
    """

    def __init__(
        self,
        widths: dict[str, int],
        llm_dim: int,
        *,
        stream: str,
        to: str = "video_slow",
        pool: int = 2,
        frames: int | None = None,
    ) -> None:
        super().__init__(widths, llm_dim)
        if to in widths:
            raise ValueError(
                f"slowfast_tokens has to {to!r}, a stream that exists already; expected a new name"
            )
        if pool < 1 or (frames is not None and frames < 1):
            raise ValueError(
                f"slowfast_tokens on {stream!r} has pool {pool} and frames {frames}; "
                "expected 1 or more"
            )
        self.stream = stream
        self.slow = to  # not `self.to`, a method of torch's
        self.pool = pool
        self.frames = frames or pool * pool
        self.out_widths[to] = self.require(stream)

    def forward(
        self, streams: dict[str, Tokens], prompt: Prompt | None = None
    ) -> dict[str, Tokens]:
        if self.stream not in streams:
            return streams
        tokens = streams[self.stream]
        fast_mask = tokens.mask.any(-1, keepdim=True)  # (B, T, 1)
        fast = masked_mean(tokens.x, tokens.mask, 2).unsqueeze(2)  # (B, T, 1, D)
        index, chosen = spread(tokens.mask.any(-1), self.frames)  # (B, F) each
        clips = torch.arange(len(index), device=index.device)[:, None]
        mask = tokens.mask[clips, index] & chosen[..., None]  # (B, F, P)
        kept = squares(mask, self.pool, "slowfast_tokens")  # (B, F, P', pool ** 2)
        x = tokens.x[clips, index].movedim(-1, 0)  # (D, B, F, P)
        x = squares(x, self.pool, "slowfast_tokens").movedim(0, -1)  # (B, F, P', pool ** 2, D)
        span = tokens.span[clips, index] * chosen[..., None]
        slow = Tokens(masked_mean(x, kept, 3), kept.any(-1), span)
        return {**streams, self.stream: Tokens(fast, fast_mask, tokens.span), self.slow: slow}

    def output_grid(self, grids: dict[str, Grid]) -> dict[str, Grid]:
        if self.stream not in grids:
            return grids
        grid = grids[self.stream]
        real = grid.mask.any(-1)  # (T,)
        index, chosen = spread(real[None], self.frames)
        kept = squares(grid.mask[index[0]] & chosen[0, :, None], self.pool, "slowfast_tokens")
        slow = Grid(grid.span[index[0]] * chosen[0, :, None], kept.any(-1))
        fast = Grid(grid.span, real[:, None])
        return {**grids, self.stream: fast, self.slow: slow}


def spread(real: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Choose steps that are evenly spread over those that exist.

    Args:
        real: ``(B, T)`` bool.
        number: steps to choose, F; a clip with fewer keeps all.

    Returns:
        ``(B, F)`` long, the steps in order, and ``(B, F)`` bool, which of these places are filled.
    """
    count = real.sum(1, keepdim=True)  # (B, 1)
    place = torch.arange(number, device=real.device)[None]  # (1, F)
    # The middle of each of F equal parts of the steps that exist.
    rank = torch.where(count > number, (2 * place + 1) * count // (2 * number), place)
    filled = place < count
    # A stable sort of "not real" puts the steps that exist first, in their order.
    steps = (~real).to(torch.uint8).argsort(dim=1, stable=True)  # (B, T)
    return steps.gather(1, torch.where(filled, rank, 0)), filled
