"""Align the Q-Former's queries with its texts: BLIP-2's image-text contrastive term.

(Li et al. 2023, arXiv 2301.12597, section 3.1.) The Q-Former reads the media with its queries and,
separately, the text; neither sees the other. The objective ``contrastive`` aligns the tokens at the
connector's end with a text encoder's; this one trains the similarity by which ``qformer_matching``
draws its negatives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from avllm.distributed import gather_with_grad
from avllm.objectives._pairs import text_ids
from avllm.objectives._qformer import QFormerTerm
from avllm.objectives.contrastive import pick_own

if TYPE_CHECKING:
    from avllm.data.collate import Batch


def similarity_loss(
    similarity: Tensor, first: int, ids: Tensor, scale: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Return symmetric InfoNCE on similarities, over all processes.

    Args:
        similarity: ``(n, N)`` of this process's media and the texts of all processes; n may be 0,
            but every process has to call.
        first: the place of this process's first part among the N.
        ids: ``(n,)`` long; equal ids = equal texts, which are not negatives of each other.
        scale: inverse temperature.

    Returns:
        the sum over this process's parts of the mean of both directions, and how many parts rank
        their own text (or an equal one) first: both scalars.
    """
    n = len(similarity)
    whole, _ = gather_with_grad(similarity)  # (N, N), media of all processes by texts of all
    all_ids, _ = gather_with_grad(ids)  # (N,)
    own = first + torch.arange(n, device=ids.device)  # (n,)
    same = ids[:, None] == all_ids[None]  # (n, N)
    # A process without parts stays in the graph, for the others' backward pass.
    zero = 0.0 * whole.sum() * scale
    if not n:
        return zero, zero.detach()
    to_text = pick_own(scale * similarity, own, same)
    to_media = pick_own(scale * whole[:, first : first + n].T, own, same)
    hits = same[torch.arange(n, device=ids.device), similarity.argmax(1)].float().sum()
    return 0.5 * (to_text + to_media).sum() + zero, hits


class QFormerContrastive(QFormerTerm):
    """Match each clip with its text, and each text with its clip, among the parts of all processes.

    It needs a ``qformer`` with the option ``text`` in the connector. The text is the part's answer.

    Args:
        model: an AVLLM.
        stream: of the Q-Former, where several have a text side.
        tokenizer: hub name or folder, for a Q-Former with a separate vocabulary; the LLM's tokens
            need none.
        max_length: tokens of a text; what is longer is cut.
        captions_only: leave out questions (parts with a ``kind``), whose answers say little of
            their clip.
    """

    def forward(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum the symmetric loss over parts; ``hits``: parts that rank their own text first."""
        chosen = self.chosen(batch)
        ids = text_ids(batch.parts)[chosen]
        similarity, first = self.similarity(model, batch, chosen)
        loss, hits = similarity_loss(similarity, first, ids, self.side(model).scale)
        return loss, {"hits": hits}
