"""Next-token cross-entropy on the tokens that a row trains on: captioning and instructions alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from avllm.objectives.base import Objective

if TYPE_CHECKING:
    from avllm.data.collate import Batch
    from avllm.data.soft import Soft

IGNORE = -100


def targets(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Where the targets are predicted from, and what they are.

    Args:
        labels: ``(R, L)`` long, -100 = not trained on.

    Returns:
        ``(R, L)`` bool, True at the place **before** each target, and ``(n,)`` the targets, row by row.
    """
    at = torch.zeros_like(labels, dtype=torch.bool)
    at[:, :-1] = labels[:, 1:] != IGNORE
    return at, labels[:, 1:][labels[:, 1:] != IGNORE]


@dataclass(frozen=True)
class SoftTargets:
    """Targets that are distributions, one entry a token, ``(S,)`` each.

    Attributes:
        target: long, which of the n targets. id: long. weight: float32; those of a target sum to 1.
    """

    target: Tensor
    id: Tensor
    weight: Tensor


def soft_targets(labels: Tensor, soft: Soft | None) -> SoftTargets | None:
    """Return a batch's soft targets by the number of the target, as :func:`targets` counts them.

    Args:
        labels: ``(R, L)`` long. soft: of the batch; entries where the label is not trained on count for nothing.
    """
    if soft is None:
        return None
    at, _ = targets(labels)
    number = at.flatten().cumsum(0).view_as(labels) - 1  # (R, L), at the place before each target
    trained = (soft.place > 0) & (labels[soft.row, soft.place] != IGNORE)  # (S,)
    row, place = soft.row[trained], soft.place[trained]
    return SoftTargets(number[row, place - 1], soft.id[trained], soft.weight[trained])


def next_token_loss(logits: Tensor, wanted: Tensor, soft: SoftTargets | None = None) -> tuple[Tensor, Tensor]:
    """Cross-entropy summed over targets, and how many of them are the likeliest token.

    Args:
        logits: ``(n, V)`` at the places that :func:`targets` gives; wanted: ``(n,)``.
        soft: distributions that some of the targets have instead.

    Returns:
        two float32 scalars; zero (still on the graph of ``logits``) when n is 0.
    """
    if soft is None:
        loss = F.cross_entropy(logits.float(), wanted, reduction="sum")
    else:
        likelihood = logits.float().log_softmax(-1)  # (n, V)
        is_hard = torch.ones_like(wanted, dtype=torch.bool).index_fill(0, soft.target, False)
        hard = likelihood.gather(1, wanted[:, None]).squeeze(1)  # (n,)
        loss = -hard[is_hard].sum() - (soft.weight * likelihood[soft.target, soft.id]).sum()
    with torch.no_grad():
        hits = (logits.argmax(-1) == wanted).float().sum() if len(wanted) else loss.new_zeros(())
    return loss, hits


class NextToken(Objective):
    """Cross-entropy of each target given what stands before it; its weight is the number of targets."""

    compares = False

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.plain_head = model.head_is_plain()

    def weight(self, batch: Batch) -> float:
        """Target tokens that have a predecessor."""
        return float(batch.num_targets)

    def forward(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Summed cross-entropy, and ``hits``: targets that were the likeliest token.

        Only the hidden states at targets go through the LLM's head, so that ``(R, L, V)`` never exists; where the LLM
        does more to its logits than its head, all of them are made.
        """
        at, wanted = targets(batch.labels)  # (R, L), (n,)
        embeds = model.embed(batch)  # (R, L, D)
        if self.plain_head:
            logits = model.llm.get_output_embeddings()(model.run_decoder(embeds, batch)[at])  # (n, V)
        else:
            logits = model.run_llm(embeds, batch).logits[at]  # (n, V)
        loss, hits = next_token_loss(logits, wanted, soft_targets(batch.labels, batch.soft))
        return loss, {"hits": hits}
