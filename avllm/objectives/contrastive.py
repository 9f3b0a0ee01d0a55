"""Contrastive alignment of what the connector says about a clip with what its text says.

Symmetric InfoNCE (van den Oord et al. 2018, arXiv:1807.03748; Radford et al. 2021, arXiv:2103.00020) between the pooled
connector tokens of each stream, and of both together, and the text, over the rows of all processes.
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

if TYPE_CHECKING:
    from avllm.data.collate import Batch
    from avllm.tokens import Tokens


def info_nce(anchors: Tensor, keys: Tensor, own: Tensor, same: Tensor, scale: Tensor | float) -> Tensor:
    """Cross-entropy of each anchor's own key among all keys.

    Args:
        anchors: ``(n, D)`` unit vectors; keys: ``(N, D)`` unit vectors.
        own: ``(n,)`` long, the place of each anchor's key among the keys.
        same: ``(n, N)`` bool, keys that mean the same as the anchor's: they are no negatives.
        scale: inverse temperature.

    Returns:
        ``(n,)``: ``-scale * s_own + log sum_j exp(scale * s_j)`` over its own key and the negatives.
    """
    return pick_own(scale * anchors @ keys.T, own, same)


def pick_own(logits: Tensor, own: Tensor, same: Tensor) -> Tensor:
    """The same, ``(n,)``, for whatever similarity ``logits (n, N)`` are of."""
    mine = F.one_hot(own, logits.shape[1]).bool()  # (n, N)
    logits = logits.masked_fill(same & ~mine, -torch.inf)
    return F.cross_entropy(logits, own, reduction="none")


def symmetric_info_nce(media: Tensor, text: Tensor, ids: Tensor, scale: Tensor | float) -> tuple[Tensor, Tensor]:
    """InfoNCE from media to text and back, over all processes, summed over this process's rows.

    Args:
        media, text: ``(n, D)`` unit vectors of this process's pairs; n may be 0, every process has to call.
        ids: ``(n,)`` long; equal ids = equal texts, which are not negatives of each other.
        scale: inverse temperature.

    Returns:
        The sum over rows of the mean of both directions, and how many rows found their own text (or an equal one)
        first: both scalars.
    """
    both, first = gather_with_grad(torch.stack([media, text], 1))  # (N, 2, D), at once: each call is a wait
    all_media, all_text = both.unbind(1)  # (N, D)
    all_ids, _ = gather_with_grad(ids)  # (N,)
    own = first + torch.arange(media.shape[0], device=media.device)  # (n,)
    same = ids[:, None] == all_ids[None]  # (n, N)
    if all_text.shape[0] == 0:
        return (all_media.sum() + all_text.sum()) * scale, all_media.new_zeros(())
    losses = 0.5 * (info_nce(media, all_text, own, same, scale) + info_nce(text, all_media, own, same, scale))
    with torch.no_grad():
        best = (media @ all_text.T).argmax(1) if len(own) else own
        hits = same[torch.arange(len(own), device=own.device), best].float().sum()
    # the empty sum of a process without rows would cut the gather off the graph, and with it the others' backward
    return losses.sum() + 0.0 * (all_media.sum() + all_text.sum()), hits


class Contrastive(Objective):
    """Align pooled connector tokens with the caption (the answer of each part of a row).

    The negatives of a part are the other parts of its micro-step, of all processes: ``train.accumulate`` adds none, and
    a batch of a single part has nothing to learn from.

    Args:
        model: an AVLLM; only its widths are read here.
        pairs: two sides each, of streams that encoders give or, the second, of the text: ``audio-text``,
            ``speech+video-text``, ``video-audio``; ``av`` is ``video+audio``. None takes each stream with the text
            and all together with it. A part is in a pair when its clips have all its streams; equal texts are no
            negatives of each other in pairs without text, too.
        text: ``llm`` (last hidden states of the frozen LLM), ``llm_embeddings`` (its input embeddings), or the name
            or folder of any HF text encoder.
        dim: width of the common space.
        same: which parts are no negatives of each other: those of equal ``text``, or those of equal ``kind`` (a class
            whose captions are worded in several ways).
        captions_only: leave out questions (parts with a ``kind``), whose answers say little of their clip.
        temperature: at the start; learned, and clamped to ``[min_temperature, 1]``.
        momentum: of an exponential moving average of connector and projections (ALBEF: Li et al. 2021,
            arXiv 2107.07651; 0.995 there), whose similarities are part of the targets; none where not given. It costs
            a second pass through the connector, without gradients.
        soft: with ``momentum``, the average's share of the targets (alpha, 0.4 in the paper). Keys are those of the
            micro-step by the live weights; ALBEF's queue is not there.
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
        between_media = [p for p in self.pairs if parse_pair(p).right]
        if same not in ("text", "kind"):
            raise ValueError(f"objectives: contrastive: same is {same!r}; expected 'text' or 'kind'")
        self.same = same
        self.text = TextSide(model, text)
        self.text_projection = nn.Linear(self.text.dim, dim)
        width = model.llm.get_input_embeddings().embedding_dim
        self.media_projection = nn.ModuleDict({p: nn.Linear(width, dim) for p in self.pairs})
        self.key_projection = nn.ModuleDict({p: nn.Linear(width, dim) for p in between_media})
        self.log_temperature = nn.Parameter(torch.tensor([math.log(temperature)]))
        self.min_temperature = min_temperature
        if not 0 <= soft <= 1:
            raise ValueError(f"objectives: contrastive: soft is {soft}; expected 0 to 1")
        self.soft = soft
        self.average = None if momentum is None else Ema(self._averaged(model), momentum)

    def _averaged(self, model: Any) -> dict[str, nn.Module]:
        """The modules whose weights are averaged, by name."""
        projections = {"text": self.text_projection, "media": self.media_projection, "keys": self.key_projection}
        return {"connector": model.connector, **projections}

    def after_step(self, model: Any) -> None:
        """Move the averages, where there are any."""
        if self.average is not None:
            self.average.update(self._averaged(model))

    @property
    def scale(self) -> Tensor:
        """The inverse temperature."""
        return self.log_temperature.clamp(math.log(self.min_temperature), 0.0).neg().exp().squeeze()

    def weight(self, batch: Batch) -> float:
        """Count the (part, pair) terms that the batch has."""
        return float(sum(int(self._chosen(batch, pair).sum()) for pair in self.pairs))

    def forward(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum the symmetric loss over (part, pair); ``hits``: how many of them found their own text first."""
        streams = model.media_tokens(batch)
        given = self.text(model, batch, chosen_parts(batch, self.captions_only))  # (n, D)
        text = _unit(self.text_projection(given))  # (n, dim)
        teacher = None if self.average is None else self._by_average(self.average, model, batch, given)
        ids = text_ids(batch.parts, self.same)
        loss = text.sum() * 0.0
        all_hits = torch.zeros_like(loss)
        for pair in self.pairs:
            if any(name not in streams for name in parse_pair(pair).streams):
                continue  # single process only: with several, the model lets absent streams pass as masked dummies
            chosen = self._chosen(batch, pair)
            media = self.embed_media(streams, batch, pair)[chosen]  # (k, dim)
            keys = self.embed_keys(streams, batch, pair) if pair in self.key_projection else text
            if teacher is None:
                term, hits = symmetric_info_nce(media, keys[chosen], ids[chosen], self.scale)
            else:
                averaged = (teacher[pair][0][chosen], teacher[pair][1][chosen])
                term, hits = distilled_info_nce((media, keys[chosen]), averaged, ids[chosen], self.scale, self.soft)
            loss = loss + term
            all_hits = all_hits + hits
        return loss, {"hits": all_hits}

    def _chosen(self, batch: Batch, pair: str) -> Tensor:
        """Return the parts that are in a pair, ``(n,)`` bool."""
        return parts_with(batch, pair) & chosen_parts(batch, self.captions_only)

    def embed_text(self, model: Any, batch: Batch) -> Tensor:
        """Embed the parts' answers as unit vectors ``(n, dim)``; those of parts that are not chosen mean nothing."""
        text = self.text(model, batch, chosen_parts(batch, self.captions_only))  # (n, D)
        return _unit(self.text_projection(text))

    def embed_media(self, streams: dict[str, Tokens], batch: Batch, pair: str) -> Tensor:
        """Embed the parts' clips as unit vectors ``(n, dim)``; those of parts without all streams mean nothing."""
        return _pool(streams, batch, parse_pair(pair).left, self.media_projection[pair])

    def embed_keys(self, streams: dict[str, Tokens], batch: Batch, pair: str) -> Tensor:
        """Embed the second side of a pair without text as unit vectors ``(n, dim)``."""
        return _pool(streams, batch, parse_pair(pair).right, self.key_projection[pair])

    @torch.no_grad()
    def _by_average(self, average: Ema, model: Any, batch: Batch, given: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Return both sides of each pair by the averaged weights, ``(n, dim)`` unit vectors each.

        Args:
            average: the averages. model, batch: as an objective gets them. given: ``(n, D)`` texts.
        """
        streams = model.media_tokens_by(batch, average.weights("connector"))
        text = _unit(_linear(average.weights("text"))(given))
        media, keys = average.weights("media"), average.weights("keys")
        sides = {}
        for pair in self.pairs:
            names = parse_pair(pair)
            if any(name not in streams for name in names.streams):
                continue
            left = _pool(streams, batch, names.left, _linear(media, f"{pair}."))
            right = _pool(streams, batch, names.right, _linear(keys, f"{pair}.")) if names.right else text
            sides[pair] = (left, right)
        return sides


def _linear(weights: dict[str, Tensor], prefix: str = "") -> Callable[[Tensor], Tensor]:
    """Return a linear layer as a function of its input."""
    return partial(F.linear, weight=weights[f"{prefix}weight"], bias=weights[f"{prefix}bias"])


def _pool(
    streams: dict[str, Tokens], batch: Batch, names: tuple[str, ...], projection: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return ``(n, dim)`` unit vectors of the parts' named streams in the common space."""
    pooled, _ = pool_clip_sets(streams, names, batch.parts.set_clips)  # (S, D)
    return _unit(projection(pooled)[batch.parts.clip_set])


def _unit(x: Tensor) -> Tensor:
    """Normalize ``(n, dim)`` to unit vectors in float32."""
    return F.normalize(x.float(), dim=-1)
