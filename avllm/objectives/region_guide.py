"""Find regions again in later frames: Omni-RGPT's temporal region guide (arXiv 2501.08326, 3.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from avllm.adapters._marks import coverage, marks_of
from avllm.objectives._pairs import chosen_parts
from avllm.objectives.base import Objective
from avllm.precision import at_least_float32
from avllm.tokens import REGION_MASK

if TYPE_CHECKING:
    from avllm.data.collate import Batch


class RegionGuide(Objective):
    """Classify the visual tokens of later frames to the marks of their regions, or to none.

    With ``steps: first`` of the adapter ``token_marks``, the model is shown a region in one frame
    only, and has to follow it; this head makes its tokens do so, and is dropped after training. The
    labels are soft: the shares of a token's patch that each region covers, and the rest is no
    region. Read are the frames after a clip's first one with a region for which the row gives a box
    (a region without a time is in every frame, one that moves has several boxes).

    The targets are the answers about such clips: each counts the mean over its clips' tokens.

    Args:
        model: an AVLLM.
        stream: whose tokens are classified.
        adapter: place of the adapter in the connector whose result is read, counted from 0; -1 is
            the last. The stream has the encoder's frames and patches there.
        n: number of marks; that of the adapter ``token_marks``.
        hidden: width of the head.
    """

    compares = False

    def __init__(
        self, model: Any, *, stream: str, adapter: int = -1, n: int = 100, hidden: int = 256
    ) -> None:
        super().__init__(model)
        count = len(model.connector)
        if not -count <= adapter < count:
            raise ValueError(
                f"region_guide has adapter {adapter}; the connector has {count}, numbered from 0"
            )
        widths = model.connector.adapters[adapter].out_widths
        if stream not in widths:
            raise ValueError(
                f"region_guide has stream {stream!r}; adapter {adapter} gives {sorted(widths)}"
            )
        self.stream = stream
        self.after = adapter % count + 1  # its place among the connector's steps
        self.n = n
        self.head = nn.Sequential(
            nn.Linear(widths[stream], hidden), nn.GELU(), nn.Linear(hidden, n + 1)
        )

    def weight(self, batch: Batch) -> float:
        """Count the answers about clips with a region in a later frame."""
        return float(self._chosen(batch).sum())

    def forward(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum the loss over answers; ``hits``: the share of tokens whose likeliest class is right.

        Raises:
            UserError: ``no_grid``: the tokens are not the patches of a picture.
        """
        tokens = model.media_steps(batch)[self.after].get(self.stream)
        chosen = self._chosen(batch)
        zero = sum((parameter.sum() for parameter in self.head.parameters()), torch.zeros(())) * 0.0
        if tokens is None or not bool(chosen.any()):
            return zero, {"hits": zero.detach()}
        extra = self._extra(batch)
        later = later_steps(extra).unsqueeze(-1) & tokens.mask  # (B, T, P)
        labels = soft_labels(extra, tokens.x.shape[2], self.n)  # (B, T, P, n + 1)
        logits = at_least_float32(self.head(tokens.x))  # (B, T, P, n + 1)
        losses = -(labels * logits.log_softmax(-1)).sum(-1)  # (B, T, P)
        right = (logits.argmax(-1) == labels.argmax(-1)).float()
        sets = batch.parts.set_clips
        by_clip = torch.stack([_mean(losses, later), _mean(right, later)], -1)  # (B, 2)
        sums = sets.means(by_clip)[batch.parts.clip_set][chosen].sum(0)  # (2,)
        return sums[0] + zero, {"hits": sums[1].detach()}

    def _extra(self, batch: Batch) -> Mapping[str, Tensor]:
        """Return the side information of the encoder that the stream comes from."""
        stream = batch.streams.get(self.stream.split(".")[0])
        return {} if stream is None else stream.extra

    def _chosen(self, batch: Batch) -> Tensor:
        """Return the answers about clips with a region in a later frame, ``(n,)`` bool."""
        parts = batch.parts
        extra = self._extra(batch)
        if REGION_MASK not in extra:
            return torch.zeros_like(parts.row, dtype=torch.bool)
        has_later = parts.set_clips.any(later_steps(extra).any(1))  # (S,)
        return chosen_parts(batch, captions_only=False) & has_later[parts.clip_set]


def later_steps(extra: Mapping[str, Tensor]) -> Tensor:
    """Return the steps with a box after a clip's first step with one, ``(B, T)`` bool."""
    present = extra[REGION_MASK].any(-1)  # (B, T)
    return present & (present.int().cumsum(1) > 1)


def soft_labels(extra: Mapping[str, Tensor], tokens: int, n: int) -> Tensor:
    """Return the share of each token's patch that each mark covers; the last class is the rest.

    Args:
        extra: side information of a batch with regions.
        tokens: P, the patches of a step.
        n: number of marks.

    Returns:
        ``(B, T, P, n + 1)``, which sum to 1; where regions overlap, in the ratio of their shares.
    """
    share = coverage(extra, tokens)  # (B, T, K, P)
    classes = nn.functional.one_hot(marks_of(extra), n).to(share.dtype)  # (B, K, n)
    covered = torch.einsum("btkp,bkn->btpn", share, classes)  # (B, T, P, n)
    covered = covered / covered.sum(-1, keepdim=True).clamp(min=1)
    rest = 1 - covered.sum(-1, keepdim=True)
    return torch.cat([covered, rest], -1)


def _mean(x: Tensor, mask: Tensor) -> Tensor:
    """Return each clip's mean where the mask is True, 0 where nothing is: ``(B, T, P)`` -> (B,)."""
    return (x * mask).flatten(1).sum(1) / mask.flatten(1).sum(1).clamp(min=1)
