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
    """Tell each row's own pair from two hard mismatches: its clip with another text, its text with another clip.

    Wrong texts are drawn among the rows of all processes, whose token ids are exchanged. Wrong clips are drawn among
    this process's: features of a clip are megabytes, and would have to be sent whole. Each frame or window is read
    three times, once a pair: with many of them it is this term that limits the batch.

    Args:
        model: an AVLLM. stream, tokenizer, max_length, captions_only: as in the objective ``qformer_contrastive``.
    """

    def forward(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Summed loss over rows; ``hits``: the share of a row's pairs that are told right (who says no: 2/3)."""
        rows = self.rows(batch)
        words, units = self.words(batch, rows), self.units(model, batch)
        ids = text_ids(batch)[rows]
        text_key, has_text, clip_key, has_clip = self.draw(model, batch, rows, ids)
        everyones, first = gather_words(words)
        n, own = len(ids), rows.nonzero().squeeze(1)  # (n,)
        mine = first + torch.arange(n, device=own.device)
        media = torch.cat([own, own, own[clip_key]])  # (3n,)
        texts = everyones.pick(torch.cat([mine, text_key, mine]))
        logits = self.judge(model, units, media, texts)  # (3n, 2)
        yes, no_text, no_clip = (logits[:, 1] - logits[:, 0]).float().split(n) if n else [logits.sum(1)] * 3
        loss = matching_loss(yes, [(no_text, has_text), (no_clip, has_clip)])
        right = (yes > 0).float() + (no_text <= 0) * has_text + (no_clip <= 0) * has_clip
        return loss, {"hits": (right / (1.0 + has_text.float() + has_clip.float())).sum()}

    @torch.no_grad()
    def draw(self, model: Any, batch: Batch, rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Hard negatives of the n rows: ``(n,)`` the wrong text among all processes' and whether there is one, ``(n,)``
        the wrong clip among this process's n and whether there is one. Equal texts are no negatives.
        """
        similarity, first = self.similarity(model, batch, rows)  # (n, N)
        same = ids[:, None] == gather_with_grad(ids)[0][None]  # (n, N)
        here, scale = slice(first, first + len(ids)), float(self.side(model).scale)
        texts = sample_negatives(similarity, same, scale)
        clips = sample_negatives(similarity[:, here].T, same[:, here], scale)
        return *texts, *clips

    def judge(self, model: Any, units: Units, media: Tensor, words: Words) -> Tensor:
        """Logits ``(p, 2)``, no and yes, of p pairs.

        Args:
            units: of all rows. media: ``(p,)`` the row whose media stand in each pair.
            words: the p texts.
        """
        qformer, side = self.qformer(model), self.side(model)
        pair, unit = pairs_of(media, units)
        text = self.embed(model, words, READ).pick(pair)
        read = qformer.read(units.x[unit], units.keep[unit], text)[:, : qformer.query_tokens.shape[1]]  # (k, Q, D)
        return mean_by_pair(side.match(read).mean(1), pair, len(media))
