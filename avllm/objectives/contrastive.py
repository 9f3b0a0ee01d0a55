"""Align the embeddings of a clip and of its text.

Symmetric InfoNCE (van den Oord et al. 2018, arXiv:1807.03748; Radford et al. 2021,
arXiv:2103.00020) between the pooled connector tokens of each stream, and of both together, and the
text, over the rows of all processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avllm.distributed import gather_with_grad
from avllm.objectives._ema import Ema
from avllm.objectives._pairs import (
    check_pairs,
    chosen_parts,
    default_pairs,
    parse_pair,
    parts_with,
    pool_clip_sets,
    text_ids,
)
from avllm.objectives._soft_targets import distilled_info_nce
from avllm.objectives._text import TextSide
from avllm.objectives.base import Objective
from avllm.precision import at_least_float32

if TYPE_CHECKING:
    from avllm.data.collate import Batch
    from avllm.tokens import Tokens


def info_nce(
    anchors: Tensor, keys: Tensor, own: Tensor, same: Tensor, scale: Tensor | float
) -> Tensor:
    """Return the cross-entropy of each anchor's own key among all keys.

    Args:
        anchors: ``(n, D)`` unit vectors.
        keys: ``(N, D)`` unit vectors.
        own: ``(n,)`` long, the place of each anchor's key among the keys.
        same: ``(n, N)`` bool, keys that mean the same as the anchor's: they are no negatives.
        scale: inverse temperature.

    Returns:
        ``(n,)``: ``-scale * s_own + log sum_j exp(scale * s_j)`` over its own key and the
        negatives.
    """
    return pick_own(scale * anchors @ keys.T, own, same)


def pick_own(logits: Tensor, own: Tensor, same: Tensor) -> Tensor:
    """Return :func:`info_nce`, ``(n,)``, of logits ``(n, N)`` by any measure of similarity."""
    is_own = F.one_hot(own, logits.shape[1]).bool()  # (n, N)
    logits = logits.masked_fill(same & ~is_own, -torch.inf)
    return F.cross_entropy(logits, own, reduction="none")


def symmetric_info_nce(
    media: Tensor, text: Tensor, ids: Tensor, scale: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Return InfoNCE from media to text and back, over all processes.

    Args:
        media, text: ``(n, D)`` unit vectors of this process's pairs; n may be 0, every process has
            to call.
        ids: ``(n,)`` long; equal ids = equal texts, which are not negatives of each other.
        scale: inverse temperature.

    Returns:
        the sum over this process's rows of the mean of both directions, and how many rows rank
        their own text (or an equal one) first: both scalars.
    """
    # Both in one call, since processes wait for each other in each.
    both, first = gather_with_grad(torch.stack([media, text], 1))  # (N, 2, D)
    all_media, all_text = both.unbind(1)  # (N, D)
    all_ids, _ = gather_with_grad(ids)  # (N,)
    own = first + torch.arange(media.shape[0], device=media.device)  # (n,)
    same = ids[:, None] == all_ids[None]  # (n, N)
    if all_text.shape[0] == 0:
        return (all_media.sum() + all_text.sum()) * scale, all_media.new_zeros(())
    to_text = info_nce(media, all_text, own, same, scale)  # (n,)
    to_media = info_nce(text, all_media, own, same, scale)  # (n,)
    losses = 0.5 * (to_text + to_media)
    with torch.no_grad():
        best = (media @ all_text.T).argmax(1) if len(own) else own
        hits = same[torch.arange(len(own), device=own.device), best].float().sum()
    # A process without rows stays in the graph by this zero, for the others' backward pass.
    zero = 0.0 * (all_media.sum() + all_text.sum())
    return losses.sum() + zero, hits


class Contrastive(Objective):
    """Align pooled connector tokens with the caption (the answer of each part of a row).

    The negatives of a part are the other parts of its micro-step, of all processes:
    ``train.accumulate`` adds none, and a batch of a single part has nothing to learn from.

    Args:
        model: an AVLLM; only its widths are read here.
        pairs: two sides each, of streams that encoders make or, the second, of the text:
            ``audio-text``, ``speech+video-text``, ``video-audio``; ``av`` is ``video+audio``. None
            takes each stream with the text and all together with it. A part is in a pair when its
            clips have all its streams; equal texts are no negatives of each other in pairs without
            text, too.
        text: ``llm`` (last hidden states of the frozen LLM), ``llm_embeddings`` (its input
            embeddings), or the name or folder of any HF text encoder.
        dim: width of the common space.
        same: which parts are no negatives of each other: those of equal ``text``, or those of equal
            ``kind`` (a class whose captions are worded in several ways).
        captions_only: leave out questions (parts with a ``kind``), whose answers say little of
            their clip.
        temperature: at the start; learned, and clamped to ``[min_temperature, 1]``.
        min_temperature: the lowest that it may learn.
        momentum: of an exponential moving average of connector and projections (ALBEF: Li et al.
            2021, arXiv 2107.07651; 0.995 there), whose similarities are part of the targets; none
            where not given. It costs a second pass through the connector, without gradients.
        soft: with ``momentum``, the average's share of the targets (alpha, 0.4 in the paper). Keys
            are those of the micro-step by the live weights; there is no queue as in ALBEF.
    """

    def __init__(
        self,
        model: Any,
        *,
        pairs: list[str] | None = None,
        text: str = "llm",
        dim: int = 256,
        same: str = "text",
        captions_only: bool = False,
        temperature: float = 0.07,
        min_temperature: float = 0.01,
        momentum: float | None = None,
        soft: float = 0.4,
    ) -> None:
        super().__init__(model)
        self.captions_only = captions_only
        self.pairs = check_pairs(pairs or default_pairs(model), model)
        without_text = [pair for pair in self.pairs if parse_pair(pair).right]
        if same not in ("text", "kind"):
            raise ValueError(
                f"objectives: contrastive: same is {same!r}; expected 'text' or 'kind'"
            )
        self.same = same
        self.text = TextSide(model, text)
        self.text_projection = nn.Linear(self.text.dim, dim)
        width = model.llm.get_input_embeddings().embedding_dim
        self.media_projection = nn.ModuleDict({pair: nn.Linear(width, dim) for pair in self.pairs})
        self.key_projection = nn.ModuleDict({pair: nn.Linear(width, dim) for pair in without_text})
        self.log_temperature = nn.Parameter(torch.tensor([math.log(temperature)]))
        self.min_temperature = min_temperature
        if not 0 <= soft <= 1:
            raise ValueError(f"objectives: contrastive: soft is {soft}; expected 0 to 1")
        self.soft = soft
        self.average = None if momentum is None else Ema(self._averaged(model), momentum)

    def _averaged(self, model: Any) -> dict[str, nn.Module]:
        """Return the modules whose weights are averaged, by name."""
        return {
            "connector": model.connector,
            "text": self.text_projection,
            "media": self.media_projection,
            "keys": self.key_projection,
        }

    def after_step(self, model: Any) -> None:
        """Move the averages, where there are any."""
        if self.average is not None:
            self.average.update(self._averaged(model))

    @property
    def scale(self) -> Tensor:
        """Return the inverse temperature."""
        return self.log_temperature.clamp(math.log(self.min_temperature), 0.0).neg().exp().squeeze()

    def weight(self, batch: Batch) -> float:
        """Count the (part, pair) terms that the batch has."""
        return float(sum(int(self._chosen(batch, pair).sum()) for pair in self.pairs))

    def forward(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum the symmetric loss over (part, pair); ``hits``: those that rank their text first."""
        streams = model.media_tokens(batch)
        vectors = self.text(model, batch, chosen_parts(batch, self.captions_only))  # (n, D)
        text = _unit(self.text_projection(vectors))  # (n, dim)
        teacher = None
        if self.average is not None:
            teacher = self._by_average(self.average, model, batch, vectors)
        ids = text_ids(batch.parts, self.same)
        loss = text.sum() * 0.0
        all_hits = torch.zeros_like(loss)
        for pair in self.pairs:
            if any(name not in streams for name in parse_pair(pair).streams):
                # In a single process only: with several, absent streams are masked dummies.
                continue
            chosen = self._chosen(batch, pair)
            media = self.embed_media(streams, batch, pair)[chosen]  # (k, dim)
            keys = self.embed_keys(streams, batch, pair) if pair in self.key_projection else text
            live = (media, keys[chosen])
            if teacher is None:
                term, hits = symmetric_info_nce(*live, ids[chosen], self.scale)
            else:
                left, right = teacher[pair]
                averaged = (left[chosen], right[chosen])
                term, hits = distilled_info_nce(live, averaged, ids[chosen], self.scale, self.soft)
            loss = loss + term
            all_hits = all_hits + hits
        return loss, {"hits": all_hits}

    def _chosen(self, batch: Batch, pair: str) -> Tensor:
        """Return the parts that are in a pair, ``(n,)`` bool."""
        return parts_with(batch, pair) & chosen_parts(batch, self.captions_only)

    def embed_text(self, model: Any, batch: Batch) -> Tensor:
        """Embed the parts' answers as unit vectors ``(n, dim)``.

        Vectors of parts that are not chosen mean nothing.
        """
        text = self.text(model, batch, chosen_parts(batch, self.captions_only))  # (n, D)
        return _unit(self.text_projection(text))

    def embed_media(self, streams: dict[str, Tokens], batch: Batch, pair: str) -> Tensor:
        """Embed the parts' clips as unit vectors ``(n, dim)``.

        Vectors of parts without all streams of the pair mean nothing.
        """
        return _pool(streams, batch, parse_pair(pair).left, self.media_projection[pair])

    def embed_keys(self, streams: dict[str, Tokens], batch: Batch, pair: str) -> Tensor:
        """Embed the second side of a pair without text as unit vectors ``(n, dim)``."""
        return _pool(streams, batch, parse_pair(pair).right, self.key_projection[pair])

    @torch.no_grad()
    def _by_average(
        self, average: Ema, model: Any, batch: Batch, vectors: Tensor
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Return both sides of each pair by the averaged weights, ``(n, dim)`` unit vectors each.

        Args:
            average: the averages.
            model, batch: as an objective gets them.
            vectors: ``(n, D)`` of the parts' texts.
        """
        streams = model.media_tokens_by(batch, average.weights("connector"))
        text = _unit(_linear(average.weights("text"))(vectors))
        media = average.weights("media")
        keys = average.weights("keys")
        sides = {}
        for pair in self.pairs:
            names = parse_pair(pair)
            if any(name not in streams for name in names.streams):
                continue
            left = _pool(streams, batch, names.left, _linear(media, f"{pair}."))
            right = text
            if names.right:
                right = _pool(streams, batch, names.right, _linear(keys, f"{pair}."))
            sides[pair] = (left, right)
        return sides


def _linear(weights: dict[str, Tensor], prefix: str = "") -> Callable[[Tensor], Tensor]:
    """Return a linear layer as a function of its input."""
    return partial(F.linear, weight=weights[f"{prefix}weight"], bias=weights[f"{prefix}bias"])


def _pool(
    streams: dict[str, Tokens],
    batch: Batch,
    names: tuple[str, ...],
    projection: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return ``(n, dim)`` unit vectors of the parts' named streams in the common space."""
    pooled, _ = pool_clip_sets(streams, names, batch.parts.set_clips)  # (S, D)
    return _unit(projection(pooled)[batch.parts.clip_set])


def _unit(x: Tensor) -> Tensor:
    """Normalize ``(n, dim)`` to unit vectors in float32."""
    return F.normalize(at_least_float32(x), dim=-1)
