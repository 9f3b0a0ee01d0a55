"""Keep the queries of a window apart: FAVOR's diversity loss (arXiv 2310.05863, equation 6)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from avllm.objectives._pairs import chosen_parts
from avllm.objectives.base import Objective
from avllm.precision import at_least_float32

if TYPE_CHECKING:
    from avllm.data.collate import Batch


class QueryDiversity(Objective):
    """Take the mean cosine between different tokens of the same step of a stream.

    It is 0 for orthogonal tokens and 1 for equal ones; a step is a frame or a window that a
    Q-Former has read. The targets are the answers about clips: each counts its clips' mean.

    Args:
        model: an AVLLM.
        stream: whose tokens to keep apart.
        adapter: place of the adapter in the connector whose result is read, counted from 0; -1 is
            the last. FAVOR's is the Q-Former, before the projection.
    """

    compares = False
    figures = ()  # its cosine falls

    def __init__(self, model: Any, *, stream: str, adapter: int = -1) -> None:
        super().__init__(model)
        count = len(model.connector)
        if not -count <= adapter < count:
            raise ValueError(
                f"query_diversity has adapter {adapter}; the connector has {count}, numbered from 0"
            )
        if stream not in model.connector.adapters[adapter].out_widths:
            known = sorted(model.connector.adapters[adapter].out_widths)
            raise ValueError(
                f"query_diversity has stream {stream!r}; adapter {adapter} gives {known}"
            )
        self.stream = stream
        self.after = adapter % count + 1  # its place among the connector's steps

    def weight(self, batch: Batch) -> float:
        """Count the answers about clips."""
        return float(self._chosen(batch).sum())

    def forward(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum over answers the mean cosine in their clips; ``cosine``: the same, for the log."""
        tokens = model.media_steps(batch)[self.after].get(self.stream)
        if tokens is None:
            zero = torch.zeros((), device=batch.input_ids.device)
            return zero, {"cosine": zero}
        parts = batch.parts
        of_clip = mean_cosine(tokens.x, tokens.mask)  # (B,)
        of_set = parts.set_clips.means(of_clip[:, None])[:, 0]  # (S,)
        loss = of_set[parts.clip_set][self._chosen(batch)].sum()
        return loss, {"cosine": loss.detach()}

    def _chosen(self, batch: Batch) -> Tensor:
        """Return the answers that have a clip, ``(n,)`` bool."""
        parts = batch.parts
        has_clip = parts.set_clips.sizes() > 0  # (S,)
        return chosen_parts(batch, captions_only=False) & has_clip[parts.clip_set]


def mean_cosine(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean cosine between different tokens of a step, averaged over a clip's steps.

    Args:
        x: ``(B, T, P, D)``.
        mask: ``(B, T, P)`` bool.

    Returns:
        ``(B,)``; 0 for a clip of which no step has two tokens.
    """
    unit = F.normalize(at_least_float32(x), dim=-1) * mask.unsqueeze(-1)
    count = mask.sum(-1)  # (B, T)
    # The square of the sum of unit vectors holds every pair twice, and each vector with itself.
    pairs = unit.sum(2).square().sum(-1) - count  # (B, T)
    cosine = pairs / (count * (count - 1)).clamp(min=1)
    has_pair = count > 1
    mean: Tensor = (cosine * has_pair).sum(1) / has_pair.sum(1).clamp(min=1)
    return mean
