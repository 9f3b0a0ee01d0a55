"""Prefer tokens that the media make likelier: contrastive decoding (VCD, arXiv 2311.16922)."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LogitsProcessor

from avllm.decoders._references import Reference, last_question, with_noise, without_media
from avllm.decoders.base import Decoder


def contrast(scores: Tensor, reference: Tensor, alpha: float, beta: float) -> Tensor:
    """Move logits away from those of a reference, among the plausible tokens.

    Args:
        scores, reference: ``(R, V)``.
        alpha: how far; 0 leaves the scores of plausible tokens to the bit.
        beta: tokens less likely than this share of the likeliest one get -inf; 0 admits all.
    """
    moved = scores + alpha * (scores - reference)
    if beta == 0:
        return moved
    cutoff = scores.amax(-1, keepdim=True) + math.log(beta)
    return moved.masked_fill(scores < cutoff, -torch.inf)


class ContrastiveDecoding(Decoder):
    """Contrast the logits of a prompt with those of a reference, a prompt that lacks something.

    The result is ``(1 + alpha)`` times the logits less ``alpha`` times the reference's logits.

    The other prompt has its own cache and reads each token of the answer once, so that a step costs
    two passes of one token. Rows in which nothing is lacking are answered as without this decoder.

    Args:
        reference: ``corrupted_media``: the clips with noise in their encoders' features.
            ``no_media``: no clips. ``no_examples``: the last question with its clips alone, without
            earlier turns (MVCD, for examples in context).
        alpha: weight of the reference, 0 or more.
        beta: least probability of a token, as a share of the likeliest one's: 0 to 1.
        noise: for ``corrupted_media``, the noise's share of the features' variance: 0 to 1.
        seed: of the noise, which also follows from the row's id.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self,
        *,
        reference: Literal["corrupted_media", "no_media", "no_examples"] = "corrupted_media",
        alpha: float = 1.0,
        beta: float = 0.1,
        noise: float = 0.5,
        seed: int = 0,
    ) -> None:
        if not 0 <= alpha < math.inf:
            raise ValueError(f"alpha is {alpha}; expected 0 or more")
        for name, value in (("beta", beta), ("noise", noise)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; expected 0 to 1")
        self.reference, self.alpha, self.beta = reference, alpha, beta
        self.noise, self.seed = noise, seed

    def processors(self, model: Any, batch: Any) -> list[LogitsProcessor]:
        """Return the contrast with the reference; nothing where no row differs from it."""
        reference = self._read(model, batch)
        if not bool(reference.differs.any()):
            return []
        return [_Contrast(model, reference, self.alpha, self.beta)]

    def _read(self, model: Any, batch: Any) -> Reference:
        if self.reference == "no_media":
            return without_media(model, batch)
        if self.reference == "no_examples":
            return last_question(model, batch)
        return with_noise(model, batch, self.noise, self.seed)


class _Contrast(LogitsProcessor):
    """Contrast each step with the reference, whose rows are in the LLM's cache."""

    def __init__(self, model: Any, reference: Reference, alpha: float, beta: float) -> None:
        self.model, self.reference = model, reference
        self.alpha, self.beta = alpha, beta
        self.cached: Any = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the contrasted scores ``(R, V)``.

        Raises:
            ValueError: the rows are not those of the batch (beams change their order).
        """
        batch = self.reference.batch
        if input_ids.shape[0] != batch.input_ids.shape[0]:
            raise ValueError(
                f"{input_ids.shape[0]} rows for {batch.input_ids.shape[0]} prompts; expected one "
                "a prompt: contrastive decoding takes greedy or sampled answers, no beams"
            )
        if self.cached is None:
            embeds = self.model.merge_media(batch.input_ids, self.reference.tokens, batch)
            self.cached = self.model.prefill(embeds, batch, self.reference.tokens)
        else:
            self.cached.extend(input_ids[:, -1:])
        logits = self.cached.logits.to(scores.device, scores.dtype)
        moved = contrast(scores, logits, self.alpha, self.beta)
        return torch.where(self.reference.differs[:, None], moved, scores)
