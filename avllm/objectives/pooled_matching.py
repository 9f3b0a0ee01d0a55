"""Classify pairs of clip and text as matching or not, with hard negatives, on pooled tokens.

A small head decides over [media, text, media * text] of the pooled connector tokens and the text
vector. Where the connector has a Q-Former that reads text, ``qformer_matching`` is the stronger
one: BLIP-2's own term.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avllm.distributed import gather_with_grad
from avllm.objectives._pairs import (
    check_pairs,
    chosen_parts,
    default_pairs,
    matching_loss,
    parse_pair,
    parts_with,
    pool_clip_sets,
    sample_negatives,
    text_ids,
)
from avllm.objectives._text import TextSide
from avllm.objectives.base import Objective
from avllm.precision import at_least_float32

if TYPE_CHECKING:
    from avllm.data.collate import Batch


class PooledMatching(Objective):
    """Separate matching (clip, text) pairs from hard mismatches of the batch of all processes.

    Args:
        model: an AVLLM; only its widths are read here.
        pair: streams and the text: ``video-text``, ``speech+video-text``, ``av-text``; None takes
            all streams together.
        text: as in the objective ``contrastive``.
        dim: width of the head.
    """

    def __init__(
        self, model: Any, *, pair: str | None = None, text: str = "llm", dim: int = 256
    ) -> None:
        super().__init__(model)
        pair = check_pairs([pair] if pair else default_pairs(model)[-1:], model)[0]
        if parse_pair(pair).right:
            raise ValueError(
                f"objectives: pooled_matching: pair is {pair!r}; expected a text as its second side"
            )
        self.pair, self.text = pair, TextSide(model, text)
        self.text_projection = nn.Linear(self.text.dim, dim)
        self.media_projection = nn.Linear(model.llm.get_input_embeddings().embedding_dim, dim)
        self.head = nn.Sequential(nn.Linear(3 * dim, dim), nn.GELU(), nn.Linear(dim, 1))

    def weight(self, batch: Batch) -> float:
        """Count the parts that have a text and all streams of the pair."""
        return float(self._chosen(batch).sum())

    def _chosen(self, batch: Batch) -> Tensor:
        return parts_with(batch, self.pair) & chosen_parts(batch, captions_only=False)

    def forward(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum the loss over parts; ``hits``: matching pairs that are classified as matching."""
        streams = model.media_tokens(batch)
        texts = at_least_float32(self.text_projection(self.text(model, batch)))  # (n, dim)
        if any(name not in streams for name in parse_pair(self.pair).streams):
            return texts.sum() * 0.0, {"hits": texts.new_zeros(())}
        chosen = self._chosen(batch)
        names = parse_pair(self.pair).left
        pooled, _ = pool_clip_sets(streams, names, batch.parts.set_clips)  # (S, D)
        media = at_least_float32(self.media_projection(pooled))[batch.parts.clip_set]  # (n, dim)
        return self._loss(media[chosen], texts[chosen], text_ids(batch.parts)[chosen])

    def _loss(self, media: Tensor, texts: Tensor, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        all_media, _ = gather_with_grad(media)  # (N, dim)
        all_texts, _ = gather_with_grad(texts)  # (N, dim)
        all_ids, _ = gather_with_grad(ids)  # (N,)
        same = ids[:, None] == all_ids[None]  # (n, N)
        with torch.no_grad():
            to_texts = F.normalize(media, dim=-1) @ F.normalize(all_texts, dim=-1).T  # (n, N)
            text_key, has_negative = sample_negatives(to_texts, same)
            to_media = F.normalize(texts, dim=-1) @ F.normalize(all_media, dim=-1).T  # (n, N)
            media_key, _ = sample_negatives(to_media, same)
        positive = self.judge(media, texts)
        negatives = [
            (self.judge(media, all_texts[text_key]), has_negative),
            (self.judge(all_media[media_key], texts), has_negative),
        ]
        # The zero keeps a process without parts in the graph, for the others' backward pass.
        zero = 0.0 * (all_media.sum() + all_texts.sum())
        loss = matching_loss(positive, negatives) + zero
        return loss, {"hits": (positive > 0).float().sum()}

    def judge(self, media: Tensor, texts: Tensor) -> Tensor:
        """Return the logits that media and texts, ``(n, dim)`` each, belong together: ``(n,)``."""
        logits = self.head(torch.cat([media, texts, media * texts], dim=-1))  # (n, 1)
        return at_least_float32(logits).squeeze(-1)
