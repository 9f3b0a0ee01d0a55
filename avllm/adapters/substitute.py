"""Let one stream's tokens take another's places: SoundCLIP (arXiv 2506.10416, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from avllm.adapters.base import Adapter, Prompt, masked_mean
from avllm.tokens import Grid, Tokens


class Substitute(Adapter):
    """Put at each token of a stream what another stream holds at that moment; length stays.

    So a model that was trained to see gets sound where it expects sight: number, places, times and
    mask of the tokens do not change. The other stream is consumed. A clip without the one that is
    replaced has no places for it, and one without the other keeps what it shows.

    Args:
        stream: whose places are taken, such as ``video``.
        by: whose tokens take them; of the same width, see ``shared_space_projector``.
        keep: how many tokens of each step stay: those most like the substitute (the paper's
            sound-relevant patches).
    """

    def __init__(
        self, widths: dict[str, int], llm_dim: int, *, stream: str, by: str, keep: int = 0
    ) -> None:
        super().__init__(widths, llm_dim)
        if self.require(stream) != self.require(by):
            raise ValueError(
                f"substitute: {stream!r} has width {widths[stream]} and {by!r} {widths[by]}; "
                "expected one width: put shared_space_projector before it"
            )
        if keep < 0:
            raise ValueError(f"substitute on {stream!r} has keep {keep}; expected 0 or more")
        self.stream = stream
        self.by = by
        self.keep = keep
        self.out_widths.pop(by)

    def forward(
        self, streams: dict[str, Tokens], prompt: Prompt | None = None
    ) -> dict[str, Tokens]:
        others = {name: tokens for name, tokens in streams.items() if name != self.by}
        if self.stream not in streams or self.by not in streams:
            return others
        own, other = streams[self.stream], streams[self.by]
        heard = masked_mean(other.x, other.mask, 2)  # (B, S, D) one token a step of the other
        step = nearest(own.span, other.span, other.mask.any(-1))  # (B, T)
        clips = torch.arange(len(step), device=step.device)[:, None]
        new = heard[clips, step].unsqueeze(2).expand_as(own.x)  # (B, T, P, D)
        replaced = own.mask & other.present()[:, None, None]  # (B, T, P)
        if self.keep:
            replaced = replaced & ~self._most_alike(own, new)
        return {**others, self.stream: own.with_x(torch.where(replaced[..., None], new, own.x))}

    def output_grid(self, grids: dict[str, Grid]) -> dict[str, Grid]:
        return {name: grid for name, grid in grids.items() if name != self.by}

    def _most_alike(self, own: Tokens, new: Tensor) -> Tensor:
        """Return which ``keep`` tokens of each step are most like the substitute, (B, T, P)."""
        cosine = (normalize(own.x, dim=-1) * normalize(new, dim=-1)).sum(-1)  # (B, T, P)
        cosine = cosine.masked_fill(~own.mask, -torch.inf)
        order = cosine.argsort(dim=-1, descending=True, stable=True)
        rank = order.argsort(dim=-1)  # the place of each token in that order
        return rank < self.keep


def nearest(span: Tensor, other: Tensor, real: Tensor) -> Tensor:
    """Return for each step the other stream's step whose centre is nearest in time.

    Args:
        span: ``(B, T, 2)`` seconds.
        other: ``(B, S, 2)`` seconds.
        real: ``(B, S)`` bool, the other's steps that exist.

    Returns:
        ``(B, T)`` long; the earlier one of two as near.
    """
    distance = (span.mean(-1)[:, :, None] - other.mean(-1)[:, None]).abs()  # (B, T, S)
    return distance.masked_fill(~real[:, None], torch.inf).argmin(-1)
