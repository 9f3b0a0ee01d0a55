"""Distil averaged weights into a contrastive loss (ALBEF: Li et al. 2021, arXiv 2107.07651)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from avllm.distributed import gather_with_grad


def soft_targets(logits: Tensor, own: Tensor, excluded: Tensor, soft: float) -> Tensor:
    """Mix one-hot targets with a teacher's probabilities (equation 6 of the paper).

    Args:
        logits: ``(n, N)`` of the teacher.
        own: ``(n,)`` long, the place of each row's own key.
        excluded: ``(n, N)`` bool, keys that are neither the row's own nor negatives.
        soft: the teacher's share, ALBEF's alpha.

    Returns:
        ``(n, N)``; rows sum to 1, zero where excluded.
    """
    one_hot = F.one_hot(own, logits.shape[1]).to(logits.dtype)
    teacher = logits.masked_fill(excluded, -torch.inf).softmax(1)
    return (1 - soft) * one_hot + soft * teacher


def soft_cross_entropy(logits: Tensor, targets: Tensor, excluded: Tensor) -> Tensor:
    """Return ``(n,)``: minus the sum over keys of target times log-probability.

    Args:
        logits, targets: ``(n, N)``.
        excluded: ``(n, N)`` bool, keys that take no part.
    """
    log_p = logits.masked_fill(excluded, -torch.inf).log_softmax(1)
    return -(targets * log_p.masked_fill(excluded, 0.0)).sum(1)


def distilled_info_nce(
    live: tuple[Tensor, Tensor],
    averaged: tuple[Tensor, Tensor],
    ids: Tensor,
    scale: Tensor | float,
    soft: float,
) -> tuple[Tensor, Tensor]:
    """Return InfoNCE with soft targets, over all processes, in both directions.

    Args:
        live: media and text, ``(n, D)`` unit vectors each; n may be 0, every process has to call.
        averaged: the same by the averaged weights.
        ids: ``(n,)`` long; equal ids = equal texts, which are not negatives of each other.
        scale: inverse temperature, the teacher's too.
        soft: the teacher's share of the targets.

    Returns:
        the sum over this process's rows of the mean of both directions, and how many rows rank
        their own text (or an equal one) first: both scalars. With ``soft`` 0 they are those of
        ``symmetric_info_nce``.
    """
    everyones, first = gather_with_grad(torch.stack([*live, *averaged], 1))  # (N, 4, D)
    all_media, all_text, all_media_avg, all_text_avg = everyones.unbind(1)  # (N, D)
    all_ids, _ = gather_with_grad(ids)  # (N,)
    media, text = live
    zero = 0.0 * (all_media.sum() + all_text.sum()) * scale
    if not len(ids):  # a process without rows stays on the graph, for the others' backward
        return zero, zero.detach()
    own = first + torch.arange(len(ids), device=ids.device)  # (n,)
    same = ids[:, None] == all_ids[None]  # (n, N)
    excluded = same & ~F.one_hot(own, len(all_ids)).bool()
    with torch.no_grad():
        to_text = soft_targets(scale * averaged[0] @ all_text_avg.T, own, excluded, soft)
        to_media = soft_targets(scale * averaged[1] @ all_media_avg.T, own, excluded, soft)
        best = (media @ all_text.T).argmax(1)
        hits = same[torch.arange(len(own), device=own.device), best].float().sum()
    losses = soft_cross_entropy(scale * media @ all_text.T, to_text, excluded)
    losses = losses + soft_cross_entropy(scale * text @ all_media.T, to_media, excluded)
    return 0.5 * losses.sum() + zero, hits
