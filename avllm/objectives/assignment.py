"""Assign media and texts to the LLM's words, and predict the one's words from the other: VLAP.

Park, Lee and Sohn 2024 (arXiv 2404.09632, section 3.2). Both vectors of a pair are assigned to the
word embeddings of the frozen LLM by optimal transport; the cross-entropy between the assignment of
one side and the other side's similarities to the words brings the media into the LLM's space. The
words are the prototypes, so that none need training.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from avllm.distributed import gather_with_grad, sum_over_processes
from avllm.objectives._pairs import (
    check_pairs,
    chosen_parts,
    default_pairs,
    parse_pair,
    parts_with,
    pool_clip_sets,
)
from avllm.objectives._text import TextSide, answer_tokens
from avllm.objectives.base import Objective
from avllm.precision import at_least_float32

if TYPE_CHECKING:
    from avllm.data.collate import Batch

CHUNK = 4096  # words whose similarities to all vectors are held at once


class Assignment(Objective):
    """Predict the word assignment of a text from its media, and that of the media from the text.

    Args:
        model: an AVLLM.
        pair: streams and the text, as in ``contrastive``; None takes all streams together.
        text: as in ``contrastive``; of the width of the LLM's embeddings. The default is the mean
            of the answer's word embeddings.
        temperature: of the predicted distribution over words.
        epsilon: strength of the entropy in the transport problem; smaller is sharper.
        iterations: of Sinkhorn's algorithm.
        words: take the first so many words of the vocabulary alone; None: all.
        marginal: how much of the batch each word is given: ``uniform``, or ``frequency``: by how
            often it was in the answers of earlier steps (each word once more than it did).
        captions_only: read parts of the kind ``caption`` alone.
    """

    word_counts: Tensor

    def __init__(
        self,
        model: Any,
        *,
        pair: str | None = None,
        text: str = "llm_embeddings",
        temperature: float = 0.1,
        epsilon: float = 0.05,
        iterations: int = 3,
        words: int | None = None,
        marginal: str = "frequency",
        captions_only: bool = False,
    ) -> None:
        super().__init__(model)
        if marginal not in ("frequency", "uniform"):
            raise ValueError(
                f"assignment has marginal {marginal!r}; expected 'frequency' or 'uniform'"
            )
        if temperature <= 0 or epsilon <= 0 or iterations < 1:
            raise ValueError(
                f"assignment has temperature {temperature}, epsilon {epsilon} and iterations "
                f"{iterations}; expected more than 0, and 1 or more iterations"
            )
        self.pair = check_pairs([pair] if pair else default_pairs(model)[-1:], model)[0]
        if parse_pair(self.pair).right:
            raise ValueError(
                f"assignment has pair {self.pair!r}; expected a text as its second side"
            )
        self.text = TextSide(model, text)
        width = model.llm.get_input_embeddings().embedding_dim
        if self.text.dim != width:
            raise ValueError(
                f"assignment has text {text!r} of width {self.text.dim}; expected the width of the "
                f"LLM's embeddings, {width}"
            )
        self.temperature = temperature
        self.epsilon = epsilon
        self.iterations = iterations
        vocabulary = model.llm.get_input_embeddings().num_embeddings
        self.words = min(words or vocabulary, vocabulary)
        self.by_frequency = marginal == "frequency"
        self.captions_only = captions_only
        self.register_buffer("word_counts", torch.zeros(self.words))
        self._of_step = torch.zeros(self.words)  # counted since the last step: no buffer

    def weight(self, batch: Batch) -> float:
        """Count the parts that have a text and all streams of the pair."""
        return float(self._chosen(batch).sum())

    def _chosen(self, batch: Batch) -> Tensor:
        return parts_with(batch, self.pair) & chosen_parts(batch, self.captions_only)

    def forward(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum the mean of both directions over parts.

        ``hits``: parts whose media's likeliest word is one of their text's.
        """
        streams = model.media_tokens(batch)
        chosen = self._chosen(batch)
        names = parse_pair(self.pair).left
        texts = at_least_float32(self.text(model, batch, chosen))[chosen]  # (n, D)
        if any(name not in streams for name in names):
            media = texts[:0]
            texts = texts[:0]
        else:
            pooled, _ = pool_clip_sets(streams, names, batch.parts.set_clips)  # (S, D)
            media = at_least_float32(pooled)[batch.parts.clip_set][chosen]  # (n, D)
        table = self._table(model)  # (K, D)
        media, texts = F.normalize(media, dim=-1), F.normalize(texts, dim=-1)
        ids, real = answer_tokens(batch, chosen)  # (n, M)
        shares = self._shares(ids[real])
        with torch.autocast(table.device.type, enabled=False):  # scores are divided by epsilon
            words_of_text = self._expected(texts, table, shares)  # (n, D)
            words_of_media = self._expected(media, table, shares)
            loss = self._cross_entropy(media, words_of_text, table)
            loss = loss + self._cross_entropy(texts, words_of_media, table)
            hits = self._hits(media, table, ids, real)
        return loss / 2, {"hits": hits}

    @torch.no_grad()
    def _table(self, model: Any) -> Tensor:
        """Return unit vectors of the words, ``(K, D)``.

        The layer is called, since its weights may be spread over the processes.
        """
        layer = model.llm.get_input_embeddings()
        words = layer(torch.arange(self.words, device=layer.weight.device))
        return F.normalize(at_least_float32(words), dim=-1)

    def after_step(self, model: Any) -> None:
        """Count the words of the step's answers, for the steps that follow."""
        self.word_counts += self._of_step.to(self.word_counts)
        self._of_step = torch.zeros_like(self._of_step)

    def _shares(self, seen: Tensor) -> Tensor:
        """Return how much each word is given, ``(K,)``, which sums to 1.

        Args:
            seen: ids of this process's answers, which count from the next step on.
        """
        known = torch.ones_like(self.word_counts)
        if self.by_frequency:
            known = known + self.word_counts
            if self.training:
                counts = torch.bincount(seen[seen < self.words], minlength=self.words).float()
                self._of_step = self._of_step.to(counts.device) + sum_over_processes(counts)
        return known / known.sum()

    @torch.no_grad()
    def _expected(self, own: Tensor, table: Tensor, shares: Tensor) -> Tensor:
        """Return the mean word of each vector's assignment over all processes, ``(n, D)``."""
        everyone, first = gather_with_grad(own)  # (N, D)
        if not len(everyone):
            return own
        return assign(everyone, table, shares, self.epsilon, self.iterations)[
            first : first + len(own)
        ]

    def _cross_entropy(self, x: Tensor, words: Tensor, table: Tensor) -> Tensor:
        """Sum over vectors ``x (n, D)`` the cross-entropy with an assignment's mean word."""
        normalizer = LogSumExp.apply(x / self.temperature, table)  # (n,)
        result: Tensor = (normalizer - (x * words).sum(-1) / self.temperature).sum()
        return result

    @torch.no_grad()
    def _hits(self, media: Tensor, table: Tensor, ids: Tensor, real: Tensor) -> Tensor:
        best = media.new_full((len(media),), -torch.inf)
        word = ids.new_zeros(len(media))
        for first, part in chunks(table):
            top, place = (media @ part.T).max(1)
            word = torch.where(top > best, place + first, word)
            best = torch.maximum(top, best)
        return ((ids == word[:, None]) & real).any(1).float().sum()


def chunks(table: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield ``(first, rows)`` of a table, a bounded number of rows at a time."""
    for first in range(0, len(table), CHUNK):
        yield first, table[first : first + CHUNK]


def assign(x: Tensor, table: Tensor, shares: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Transport vectors to words, and return the mean word of each vector.

    Sinkhorn's algorithm (Cuturi 2013, arXiv 1306.0895) in logarithms, over a part of the words at a
    time: the plan ``(N, K)`` is never held. Each vector has the mass 1 / N, each word its share.

    Args:
        x: ``(N, D)``.
        table: ``(K, D)`` words.
        shares: ``(K,)``, their mass; sums to 1.
        epsilon: strength of the entropy.
        iterations: each satisfies the words' masses, then the vectors'.

    Returns:
        ``(N, D)``: the sum over words of their probability times the word.
    """
    rows, columns = potentials(x, table, shares, epsilon, iterations)
    mean = torch.zeros_like(x)
    for first, part in chunks(table):
        mass = (x @ part.T / epsilon + rows[:, None] + columns[None, first : first + CHUNK]).exp()
        mean += mass @ part
    return mean * len(x)


def potentials(
    x: Tensor, table: Tensor, shares: Tensor, epsilon: float, iterations: int
) -> tuple[Tensor, Tensor]:
    """Return the logarithms that scale the plan's rows ``(N,)`` and columns ``(K,)``.

    The plan is ``exp(x @ table.T / epsilon + rows[:, None] + columns)``.
    """
    each = -math.log(len(x))
    rows = x.new_zeros(len(x))
    columns = x.new_zeros(len(table))
    for _ in range(iterations):
        total = x.new_full((len(x),), -torch.inf)
        for first, part in chunks(table):
            scores = x @ part.T / epsilon  # (N, k)
            given = (scores + rows[:, None]).logsumexp(0)  # (k,)
            columns[first : first + CHUNK] = shares[first : first + CHUNK].log() - given
            scores = scores + columns[None, first : first + CHUNK]
            total = torch.logaddexp(total, scores.logsumexp(1))
        rows = each - total
    return rows, columns


class LogSumExp(torch.autograd.Function):
    """Compute ``log sum_k exp(x @ table_k)`` over a large frozen table in bounded memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor) -> Tensor:
        """Return ``(n,)`` of vectors ``x (n, D)``; the gradient needs one mean word a vector."""
        total = x.new_full((len(x),), -torch.inf)
        for _, part in chunks(table):
            total = torch.logaddexp(total, (x @ part.T).logsumexp(1))
        mean = torch.zeros_like(x)
        for _, part in chunks(table):
            mean += (x @ part.T - total[:, None]).exp() @ part
        ctx.save_for_backward(mean)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of x: the mean word under each vector's distribution."""
        (mean,) = ctx.saved_tensors
        return gradients[0][:, None] * mean, None
