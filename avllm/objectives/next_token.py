"""Train on next tokens by cross-entropy: captions and instructions alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from avllm.objectives.base import Objective
from avllm.precision import at_least_float32

if TYPE_CHECKING:
    from avllm.data.collate import Batch, BatchParts
    from avllm.data.soft import Soft

IGNORE = -100


def targets(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the targets and the places from which they are predicted.

    Args:
        labels: ``(R, L)`` long, -100 = not trained on.

    Returns:
        ``(R, L)`` bool, True at the place **before** each target, and ``(n,)`` the targets, row by
        row.
    """
    is_target = labels[:, 1:] != IGNORE  # (R, L - 1); no token precedes the first place
    at = torch.zeros_like(labels, dtype=torch.bool)
    at[:, :-1] = is_target
    return at, labels[:, 1:][is_target]


@dataclass(frozen=True)
class SoftTargets:
    """Hold targets that are distributions over tokens, one entry a token, ``(S,)`` each.

    Attributes:
        target: long, the number of the target among the n of the batch.
        id: long, the token.
        weight: float32; the weights of a target sum to 1.
    """

    target: Tensor
    id: Tensor
    weight: Tensor


def soft_targets(labels: Tensor, soft: Soft | None) -> SoftTargets | None:
    """Return a batch's soft targets, numbered as :func:`targets` lists them.

    Args:
        labels: ``(R, L)`` long.
        soft: of the batch; entries whose label is not trained on are dropped.
    """
    if soft is None:
        return None
    at, _ = targets(labels)
    number = at.flatten().cumsum(0).view_as(labels) - 1  # (R, L), at the place before each target
    trained = (soft.place > 0) & (labels[soft.row, soft.place] != IGNORE)  # (S,)
    target = number[soft.row[trained], soft.place[trained] - 1]
    return SoftTargets(target, soft.id[trained], soft.weight[trained])


def next_token_loss(
    logits: Tensor, tokens: Tensor, soft: SoftTargets | None = None
) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy summed over targets, and which of them are the likeliest token.

    Args:
        logits: ``(n, V)`` at the places that :func:`targets` returns.
        tokens: ``(n,)`` the targets.
        soft: distributions that replace some of the targets.

    Returns:
        a float32 scalar, zero (still on the graph of ``logits``) when n is 0; and ``(n,)`` bool.
    """
    if soft is None:
        loss = F.cross_entropy(at_least_float32(logits), tokens, reduction="sum")
    else:
        log_p = at_least_float32(logits).log_softmax(-1)  # (n, V)
        is_hard = torch.ones_like(tokens, dtype=torch.bool).index_fill(0, soft.target, False)
        hard = log_p.gather(1, tokens[:, None]).squeeze(1)  # (n,)
        loss = -hard[is_hard].sum() - (soft.weight * log_p[soft.target, soft.id]).sum()
    return loss, logits.detach().argmax(-1) == tokens


def right_answers(is_hit: Tensor, labels: Tensor, parts: BatchParts) -> Tensor:
    """Count the answers that greedy generation gives word for word, and all answers.

    Greedy generation says the reference exactly where each of its tokens, the end included, is the
    likeliest after those before it. So one forward pass measures it, also under sharding.

    Args:
        is_hit: ``(n,)`` bool, which targets are the likeliest token, row by row.
        labels: ``(R, L)`` long.
        parts: of the batch.

    Returns:
        ``(2,)`` float32: right answers, and answers.
    """
    is_target = labels != IGNORE  # (R, L)
    is_target[:, 0] = False  # no token precedes the first place
    is_missed = torch.zeros_like(is_target)
    is_missed[is_target] = ~is_hit
    is_answer = parts.trained.any(is_target.flatten())  # (parts,)
    is_wrong = parts.trained.any(is_missed.flatten())  # (parts,)
    return torch.stack([(is_answer & ~is_wrong).sum(), is_answer.sum()]).float()


class NextToken(Objective):
    """Sum the cross-entropy of each target given the tokens and media before it.

    The weight is the number of targets.
    """

    compares = False
    figures = ("hits", "answers")

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.plain_head = model.head_is_plain()

    def weight(self, batch: Batch) -> float:
        """Count the target tokens that have a predecessor."""
        return float(batch.num_targets)

    def forward(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum the cross-entropy over targets.

        ``hits``: targets that were the likeliest token. ``answers``: the share of answers that
        greedy generation would give word for word.

        Only the hidden states at targets go through the LLM's head, so that logits ``(R, L, V)``
        are never made; an LLM that changes the logits of its head is run in full.
        """
        at, tokens = targets(batch.labels)  # (R, L), (n,)
        embeds = model.embed(batch)  # (R, L, D)
        if self.plain_head:
            hidden = model.run_decoder(embeds, batch)[at]  # (n, D)
            logits = model.llm.get_output_embeddings()(hidden)  # (n, V)
        else:
            logits = model.run_llm(embeds, batch).logits[at]  # (n, V)
        loss, is_hit = next_token_loss(logits, tokens, soft_targets(batch.labels, batch.soft))
        answers = right_answers(is_hit, batch.labels, batch.parts)
        return loss, {"hits": is_hit.float().sum(), "answers": answers}
