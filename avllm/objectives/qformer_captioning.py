"""BLIP-2's image-grounded text generation (Li et al. 2023, arXiv 2301.12597, 3.1): the Q-Former writes the caption.

Queries see queries only, a token sees all queries and the tokens before it, and never the media: so what the caption
needs has to pass through the queries. Per frame or per window, the logits of a clip's units are averaged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from avllm.adapters._qformer_text import WRITE
from avllm.objectives._qformer import QFormerTerm, Units, Words, mean_by_pair, pairs_of
from avllm.objectives.next_token import next_token_loss

if TYPE_CHECKING:
    from avllm.data.collate import Batch


class QFormerCaptioning(QFormerTerm):
    """Next-token cross-entropy on the part's text; its weight is the number of tokens.

    Args:
        model: an AVLLM. stream, tokenizer, max_length, captions_only: as in the objective ``qformer_contrastive``.
    """

    def weight(self, batch: Batch) -> float:
        """Count the tokens of the chosen parts' texts."""
        return float(self.words(batch, self.chosen(batch)).mask.sum())

    def forward(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Summed cross-entropy over tokens; ``hits``: tokens that were the likeliest."""
        chosen = self.chosen(batch)
        words = self.words(batch, chosen)
        states = self.write(model, self.units(model, batch), batch.parts.clip_set[chosen], words)  # (n, L, D)
        head = model.llm.get_output_embeddings()
        logits = self.side(model).to_words(states[words.mask], head)  # (tokens, V)
        loss, hits = next_token_loss(logits, words.ids[words.mask])
        return loss, {"hits": hits}

    def write(self, model: Any, units: Units, media: Tensor, words: Words) -> Tensor:
        """States ``(n, L, D)``, each from the place before its token.

        Args:
            units: of all clips. media: ``(n,)`` the set of clips that each text is about.
            words: the n texts.
        """
        qformer = self.qformer(model)
        pair, unit = pairs_of(media, units)
        text = self.embed(model, Words(words.ids[:, :-1], words.mask[:, :-1]), WRITE).pick(pair)  # (k, L, D)
        read = qformer.read(units.x[unit], units.keep[unit], text, causal=True)[:, qformer.query_tokens.shape[1] :]
        return mean_by_pair(self.side(model).transform(read), pair, len(media))
