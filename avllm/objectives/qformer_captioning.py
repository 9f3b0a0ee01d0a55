"""Let the Q-Former write the caption: BLIP-2's image-grounded text generation.

(Li et al. 2023, arXiv 2301.12597, section 3.1.) Queries see queries only; a token sees all queries
and the tokens before it, and never the media. So the content of the caption has to pass through the
queries. Where the Q-Former reads per frame or window, the logits of a clip's units are averaged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from avllm.adapters._qformer_text import WRITE
from avllm.objectives._qformer import QFormerTerm, Units, Words, mean_by_pair, readings_of
from avllm.objectives.next_token import next_token_loss

if TYPE_CHECKING:
    from avllm.data.collate import Batch


class QFormerCaptioning(QFormerTerm):
    """Sum the next-token cross-entropy on each part's text; the weight is the number of tokens.

    Args:
        model: an AVLLM.
        stream, tokenizer, max_length, captions_only: as in the objective ``qformer_contrastive``.
    """

    compares = False

    def weight(self, batch: Batch) -> float:
        """Count the tokens of the chosen parts' texts."""
        return float(self.words(batch, self.chosen(batch)).mask.sum())

    def forward(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum the cross-entropy over tokens; ``hits``: tokens that were the likeliest."""
        chosen = self.chosen(batch)
        words = self.words(batch, chosen)
        media = batch.parts.clip_set[chosen]  # (n,)
        states = self.write(model, self.units(model, batch), media, words)  # (n, L, D)
        head = model.llm.get_output_embeddings()
        logits = self.side(model).to_words(states[words.mask], head)  # (tokens, V)
        loss, is_hit = next_token_loss(logits, words.ids[words.mask])
        return loss, {"hits": is_hit.float().sum()}

    def write(self, model: Any, units: Units, media: Tensor, words: Words) -> Tensor:
        """Return the states that predict each token, ``(n, L, D)``, from the place before it.

        Args:
            model: an AVLLM.
            units: of all clips.
            media: ``(n,)`` the set of clips that each text is about.
            words: the n texts.
        """
        qformer = self.qformer(model)
        pair, unit = readings_of(media, units)
        shifted = Words(words.ids[:, :-1], words.mask[:, :-1])
        text = self.embed(model, shifted, WRITE).pick(pair)  # (k, L, D)
        read = qformer.read(units.x[unit], units.keep[unit], text, causal=True)  # (k, Q + L, D)
        of_text = read[:, qformer.query_tokens.shape[1] :]  # (k, L, D)
        return mean_by_pair(self.side(model).transform(of_text), pair, len(media))
