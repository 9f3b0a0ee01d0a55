"""Classify pairs of clip and text as matching or not: BLIP-2's image-text matching term.

(Li et al. 2023, arXiv 2301.12597, section 3.1.) The Q-Former reads media and text in one pass, in
which queries and text see each other. A linear head classifies each query's output, and its logits
are averaged over the queries and over the frames or windows of the clip. Negatives are drawn by the
similarity that ``qformer_contrastive`` trains: without that objective (or BLIP-2's weights) they
are nearly random.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from avllm.adapters._qformer_text import READ
from avllm.distributed import gather_with_grad
from avllm.objectives._pairs import matching_loss, sample_negatives, text_ids
from avllm.objectives._qformer import (
    QFormerTerm,
    Units,
    Words,
    gather_words,
    mean_by_pair,
    readings_of,
)
from avllm.precision import at_least_float32

if TYPE_CHECKING:
    from avllm.data.collate import Batch


@dataclass(frozen=True)
class Negatives:
    """Hold the hard negatives of n parts, ``(n,)`` each.

    Attributes:
        text: long, the part of all processes whose text is wrong for this part's clip.
        has_text: bool, False where all texts are equal to the part's.
        clip: long, the part of this process whose clip is wrong for this part's text.
        has_clip: bool, False where there is none.
    """

    text: Tensor
    has_text: Tensor
    clip: Tensor
    has_clip: Tensor


class QFormerMatching(QFormerTerm):
    """Separate each part's pair from two hard mismatches: with a wrong text, and a wrong clip.

    Wrong texts are drawn among the parts of all processes, which exchange token ids. Wrong clips
    are drawn among the parts of this process, since the features of a clip are megabytes. Each
    frame or window is read three times, once a pair: with many of them this term limits the size of
    the batch.

    Args:
        model: an AVLLM.
        stream, tokenizer, max_length, captions_only: as in the objective ``qformer_contrastive``.
    """

    def forward(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum the loss over parts; ``hits``: the share of a part's pairs that are classified right.

        A head that always answers "no" has 2/3 of them.
        """
        chosen = self.chosen(batch)
        words = self.words(batch, chosen)
        units = self.units(model, batch)
        ids = text_ids(batch.parts)[chosen]
        negatives = self.draw(model, batch, chosen, ids)
        all_words, first = gather_words(words)
        n = len(ids)
        clips = batch.parts.clip_set[chosen]  # (n,)
        own = first + torch.arange(n, device=clips.device)  # (n,) among the parts of all processes
        # Three pairs a part: its own, its clip with a wrong text, its text with a wrong clip.
        media = torch.cat([clips, clips, clips[negatives.clip]])  # (3n,)
        texts = all_words.pick(torch.cat([own, negatives.text, own]))
        logits = self.judge(model, units, media, texts)  # (3n, 2)
        margins = at_least_float32(logits[:, 1] - logits[:, 0]).view(3, n)
        positive, wrong_text, wrong_clip = margins.unbind(0)  # (n,) each
        loss = matching_loss(
            positive,
            [(wrong_text, negatives.has_text), (wrong_clip, negatives.has_clip)],
        )
        right = (positive > 0).float()
        right = right + (wrong_text <= 0) * negatives.has_text
        right = right + (wrong_clip <= 0) * negatives.has_clip
        pairs = 1.0 + negatives.has_text.float() + negatives.has_clip.float()
        return loss, {"hits": (right / pairs).sum()}

    @torch.no_grad()
    def draw(self, model: Any, batch: Batch, chosen: Tensor, ids: Tensor) -> Negatives:
        """Draw hard negatives of the n chosen parts; equal texts are no negatives.

        Args:
            model, batch: as an objective gets them.
            chosen: bool, one a part of the batch.
            ids: ``(n,)`` of the chosen parts' texts.
        """
        similarity, first = self.similarity(model, batch, chosen)  # (n, N)
        all_ids, _ = gather_with_grad(ids)  # (N,)
        same = ids[:, None] == all_ids[None]  # (n, N)
        own = slice(first, first + len(ids))  # this process's parts among all
        scale = float(self.side(model).scale)
        text, has_text = sample_negatives(similarity, same, scale)
        clip, has_clip = sample_negatives(similarity[:, own].T, same[:, own], scale)
        return Negatives(text, has_text, clip, has_clip)

    def judge(self, model: Any, units: Units, media: Tensor, words: Words) -> Tensor:
        """Return the logits of p pairs, ``(p, 2)``: not matching, matching.

        Args:
            model: an AVLLM.
            units: of all clips.
            media: ``(p,)`` the set of clips of each pair.
            words: the p texts.
        """
        qformer = self.qformer(model)
        pair, unit = readings_of(media, units)
        text = self.embed(model, words, READ).pick(pair)
        read = qformer.read(units.x[unit], units.keep[unit], text)  # (k, Q + 1 + L, D)
        queries = read[:, : qformer.query_tokens.shape[1]]  # (k, Q, D)
        return mean_by_pair(self.side(model).match(queries).mean(1), pair, len(media))
