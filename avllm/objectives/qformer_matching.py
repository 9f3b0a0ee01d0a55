"""BLIP-2's image-text matching term (Li et al. 2023, arXiv 2301.12597, 3.1): queries and text see each other.

The Q-Former reads media and text in one pass; a linear head says of each query's output whether they belong together,
and the logits are averaged, over the queries and over the frames or windows of the clip. Negatives are drawn by the
similarity that ``qformer_contrastive`` trains: without that objective (or BLIP-2's weights) they are nearly random.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from avllm.adapters._qformer_text import READ
from avllm.distributed import gather_with_grad
from avllm.objectives._pairs import matching_loss, sample_negatives, text_ids
from avllm.objectives._qformer import QFormerTerm, Units, Words, gather_words, mean_by_pair, pairs_of

if TYPE_CHECKING:
    from avllm.data.collate import Batch


class QFormerMatching(QFormerTerm):
    """Tell each part's own pair from two hard mismatches: its clip with another text, its text with another clip.

    Wrong texts are drawn among the parts of all processes, whose token ids are exchanged. Wrong clips are drawn among
    this process's: features of a clip are megabytes, and would have to be sent whole. Each frame or window is read
    three times, once a pair: with many of them it is this term that limits the batch.

    Args:
        model: an AVLLM. stream, tokenizer, max_length, captions_only: as in the objective ``qformer_contrastive``.
    """

    def forward(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum the loss over parts; ``hits``: the share of a part's pairs that are told right (who says no: 2/3)."""
        chosen = self.chosen(batch)
        words, units = self.words(batch, chosen), self.units(model, batch)
        ids = text_ids(batch.parts)[chosen]
        text_key, has_text, clip_key, has_clip = self.draw(model, batch, chosen, ids)
        everyones, first = gather_words(words)
        n = len(ids)
        own = batch.parts.clip_set[chosen]  # (n,)
        mine = first + torch.arange(n, device=own.device)
        media = torch.cat([own, own, own[clip_key]])  # (3n,)
        texts = everyones.pick(torch.cat([mine, text_key, mine]))
        logits = self.judge(model, units, media, texts)  # (3n, 2)
        yes, no_text, no_clip = (logits[:, 1] - logits[:, 0]).float().split(n) if n else [logits.sum(1)] * 3
        loss = matching_loss(yes, [(no_text, has_text), (no_clip, has_clip)])
        right = (yes > 0).float() + (no_text <= 0) * has_text + (no_clip <= 0) * has_clip
        return loss, {"hits": (right / (1.0 + has_text.float() + has_clip.float())).sum()}

    @torch.no_grad()
    def draw(self, model: Any, batch: Batch, chosen: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draw hard negatives of the n parts; equal texts are no negatives.

        Returns:
            ``(n,)`` each: the wrong text among all processes', whether there is one, the wrong clip among this
            process's n, whether there is one.
        """
        similarity, first = self.similarity(model, batch, chosen)  # (n, N)
        same = ids[:, None] == gather_with_grad(ids)[0][None]  # (n, N)
        here, scale = slice(first, first + len(ids)), float(self.side(model).scale)
        texts = sample_negatives(similarity, same, scale)
        clips = sample_negatives(similarity[:, here].T, same[:, here], scale)
        return *texts, *clips

    def judge(self, model: Any, units: Units, media: Tensor, words: Words) -> Tensor:
        """Logits ``(p, 2)``, no and yes, of p pairs.

        Args:
            units: of all clips. media: ``(p,)`` the set of clips of each pair.
            words: the p texts.
        """
        qformer, side = self.qformer(model), self.side(model)
        pair, unit = pairs_of(media, units)
        text = self.embed(model, words, READ).pick(pair)
        read = qformer.read(units.x[unit], units.keep[unit], text)[:, : qformer.query_tokens.shape[1]]  # (k, Q, D)
        return mean_by_pair(side.match(read).mean(1), pair, len(media))
