"""Answers found by matching: the connector's account of a clip, asked a question, picks one of the batch's answers.

Visual question answering as retrieval of the answer's text (the answer-embedding head of Hu et al. 2018, arXiv
1806.03724): the LLM only lends its word embeddings, so a step costs a fraction of one through the LLM, and every fact
that is asked about has a short way back into the connector.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avllm.objectives._pairs import pool_rows, tokens_by_row
from avllm.objectives.base import Objective

if TYPE_CHECKING:
    from avllm.data.collate import Batch
    from avllm.tokens import Tokens

IGNORE = -100


class Questions(NamedTuple):
    """The questions of a batch.

    Attributes:
        row, place: ``(n,)`` the row of each question, and which of the row's questions it is.
        owner: ``(R, L)`` the question that a token belongs to, -1 for none.
        answer: ``(n,)`` the number of its answer among the batch's distinct answers.
        first: ``(m,)`` the first question that has each distinct answer.
    """

    row: Tensor
    place: Tensor
    owner: Tensor
    answer: Tensor
    first: Tensor

    def by_row(self, x: Tensor, rows: int) -> Tensor:
        """``(n, D)`` -> ``(rows, Q, D)``: the questions of each row side by side, zeros behind them."""
        most = int(self.place.max()) + 1 if len(self.place) else 1
        return x.new_zeros(rows, most, x.shape[-1]).index_put((self.row, self.place), x)


def match_loss(asked: Tensor, answers: Tensor, own: Tensor, scale: Tensor | float) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each question's own answer among the distinct answers, summed, and how many are matched best.

    Args:
        asked: ``(n, D)`` unit vectors of clip and question; answers: ``(m, D)`` unit vectors.
        own: ``(n,)`` long; scale: inverse temperature.
    """
    logits = scale * asked @ answers.T  # (n, m)
    hits = (logits.argmax(-1) == own).float().sum() if len(own) else logits.sum()
    return F.cross_entropy(logits, own, reduction="sum") if len(own) else logits.sum(), hits.detach()


def find_questions(batch: Batch) -> Questions:
    """Each part of a packed row, or each row, that has a target and a ``kind`` is a question."""
    labels = batch.labels
    segments = labels.new_zeros(*labels.shape, 2) if batch.segments is None else batch.segments.clamp(min=0)
    part = segments[..., 0] * (segments[..., 1].max() + 1) + segments[..., 1]  # (R, L)
    asked = torch.tensor([kind not in (None, "caption") for kind in batch.kinds], device=labels.device)
    trained = (labels != IGNORE) & asked[:, None]
    most = int(part.max()) + 1
    key = torch.arange(len(labels), device=labels.device)[:, None] * most + part  # (R, L) of each row's each part
    keys = key[trained].unique()  # (n,)
    number = torch.full((len(labels) * most,), -1, device=labels.device).index_copy(
        0, keys, torch.arange(len(keys), device=labels.device)
    )
    owner = number[key].masked_fill(~batch.attention_mask, -1)  # (R, L)
    row = keys // most
    place = torch.arange(len(keys), device=labels.device) - torch.searchsorted(row, row)
    sizes = owner[trained].bincount(minlength=len(keys)).tolist()
    texts = [tuple(text) for text in _cut(labels[trained].tolist(), sizes)]  # tokens of a question stand in a row
    first: dict[tuple[int, ...], int] = {}
    for n, text in enumerate(texts):
        first.setdefault(text, n)
    numbers = {text: n for n, text in enumerate(first)}
    answer = [numbers[text] for text in texts]
    answers, ones = (torch.tensor(v, dtype=torch.long, device=labels.device) for v in (answer, list(first.values())))
    return Questions(row, place, owner, answers, ones)


def _cut(items: list[int], sizes: list[int]) -> Iterator[list[int]]:
    """Consecutive pieces of a list."""
    rest = iter(items)
    return (list(islice(rest, size)) for size in sizes)


class AnswerMatch(Objective):
    """Match (clip, question) with the answer, among the distinct answers of the micro-batch.

    Rows without a ``kind`` (captions) take no part. The clip is read twice: the mean of each stream's connector tokens,
    scaled by the question, tells what the whole clip tells; and the question attends to the single tokens, for what
    only one of them tells.

    Args:
        model: an AVLLM; widths and stream names are read from it.
        dim: width of the common space; hidden: width inside, a multiple of ``heads``.
        heads: of the attention.
        words: weight of a second reading, in the LLM's own space of words: the question's words look up the tokens that
            are like them, and the answer's words are to be like what was found. So a token comes to stand where the sum
            of the words for what it tells stands, which a frozen LLM can read. 0 leaves it out.
        temperature: at the start; learned.
    """

    def __init__(
        self,
        model: Any,
        *,
        dim: int = 128,
        hidden: int = 512,
        heads: int = 4,
        words: float = 0.0,
        temperature: float = 0.07,
    ) -> None:
        super().__init__(model)
        width = int(model.llm.get_input_embeddings().embedding_dim)
        self.streams: list[str] = list(model.connector.out_streams)
        self.read = nn.Sequential(nn.LayerNorm(width * len(self.streams)), nn.Linear(width * len(self.streams), hidden))
        self.steer = nn.Linear(width, hidden)
        self.heads = heads
        self.ask, self.token_norm = nn.Linear(width, hidden), nn.LayerNorm(width)
        self.look_up = nn.Linear(width, 2 * hidden)  # keys and values
        self.asked_projection, self.answer_projection = nn.Linear(hidden, dim), nn.Linear(width, dim)
        self.log_temperature = nn.Parameter(torch.tensor([math.log(temperature)]))
        self.words = words
        if words:
            self.nothing = nn.Parameter(torch.randn(2, width) * width**-0.5)  # what is found where nothing is like it
            self.gate = nn.Linear(width, width)
            self.log_sharpness = nn.Parameter(torch.tensor([math.log(10.0)]))

    def weight(self, batch: Batch) -> float:
        """The number of questions."""
        return float(len(find_questions(batch).row))

    def forward(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Summed cross-entropy over questions; ``hits``: questions whose own answer is matched best."""
        streams = model.media_tokens(batch)
        questions = find_questions(batch)
        words = self._words(model, batch)  # (R, L, D)
        trained = batch.labels != IGNORE
        media = torch.isin(
            batch.input_ids, torch.tensor(list(model.config.media_token_ids.values())).to(trained.device)
        )
        asked = _mean_by(words, questions.owner.masked_fill(trained | media, -1), len(questions.row))  # (n, D)
        answers = _mean_by(words, questions.owner.masked_fill(~trained, -1), len(questions.row))[questions.first]
        tokens = tokens_by_row(streams, batch.clip_row, batch.input_ids.shape[0]) if streams else None
        scale = self.log_temperature.clamp(math.log(0.01), 0.0).neg().exp().squeeze()
        told = self._tell(F.layer_norm(asked, asked.shape[-1:]), questions, self._clips(streams, batch), tokens)
        loss, hits = match_loss(told, _unit(self.answer_projection(answers)), questions.answer, scale)
        if not self.words or tokens is None:
            return loss, {"hits": hits}
        found = self._look_up(asked, questions, *tokens)
        more, by_words = match_loss(found, _unit(answers), questions.answer, scale)
        return loss + self.words * more, {"hits": hits, "hits_by_words": by_words}

    def _tell(self, asked: Tensor, questions: Questions, clips: Tensor, tokens: tuple[Tensor, Tensor] | None) -> Tensor:
        """``(n, dim)`` unit vectors: what the clips ``(R, streams * D)`` and their tokens say to each question."""
        hidden = F.gelu(self.read(clips)[questions.row] * (1 + self.steer(asked)))  # (n, H)
        if tokens is not None:
            hidden = hidden + self._attend(asked, questions, *tokens)
        return _unit(self.asked_projection(hidden))

    def _attend(self, asked: Tensor, questions: Questions, tokens: Tensor, there: Tensor) -> Tensor:
        """``(n, H)``: what each question ``asked (n, D)`` finds in its row's tokens, of which some are ``there``."""
        keys, values = self.look_up(self.token_norm(tokens)).unflatten(-1, (2, self.heads, -1)).unbind(2)
        query = questions.by_row(self.ask(asked), len(tokens)).unflatten(-1, (self.heads, -1))  # (R, Q, heads, H')
        scores = torch.einsum("rqhd,rmhd->rhqm", query, keys).float() / query.shape[-1] ** 0.5
        scores = scores.masked_fill(~there[:, None, None], -1e9)
        found = torch.einsum("rhqm,rmhd->rqhd", scores.softmax(-1).to(values.dtype), values).flatten(2)  # (R, Q, H)
        return found[questions.row, questions.place]

    def _look_up(self, asked: Tensor, questions: Questions, tokens: Tensor, there: Tensor) -> Tensor:
        """``(n, D)`` unit vectors: the tokens that are like the question's words, gated by the question."""
        key, value = self.nothing.unbind()
        keys = torch.cat([tokens, key.expand(len(tokens), 1, -1)], 1).float()  # (R, M + 1, D)
        values = torch.cat([tokens, value.expand(len(tokens), 1, -1)], 1).float()
        query = questions.by_row(_unit(asked), len(tokens))  # (R, Q, D)
        like = torch.einsum("rqd,rmd->rqm", query, F.normalize(keys, dim=-1)) * self.log_sharpness.exp()
        like = like.masked_fill(~F.pad(there, (0, 1), value=True)[:, None], -1e9)
        found = torch.einsum("rqm,rmd->rqd", like.softmax(-1), values)[questions.row, questions.place]
        return _unit(found * (1 + self.gate(F.layer_norm(asked, asked.shape[-1:])).float()))

    def _words(self, model: Any, batch: Batch) -> Tensor:
        table = model.llm.get_input_embeddings()
        with torch.no_grad():
            return table(batch.input_ids.clamp(max=table.num_embeddings - 1))

    def _clips(self, streams: dict[str, Tokens], batch: Batch) -> Tensor:
        """``(R, streams * D)``: the mean of each stream's tokens; zeros where a row has none of it."""
        rows = batch.input_ids.shape[0]
        width = self.answer_projection.in_features
        absent = next(self.parameters()).new_zeros(rows, width)
        pooled = [
            pool_rows(streams, (name,), batch.clip_row, rows)[0] if name in streams else absent for name in self.streams
        ]
        return torch.cat([p.float() for p in pooled], -1)


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.float(), dim=-1)


def _mean_by(x: Tensor, owner: Tensor, count: int) -> Tensor:
    """Means ``(count, D)`` of the vectors ``x (R, L, D)`` of each owner; -1 owns nothing."""
    keep = owner >= 0
    total = x.new_zeros(count, x.shape[-1]).index_add(0, owner[keep], x[keep])
    number = x.new_zeros(count).index_add(0, owner[keep], torch.ones_like(owner[keep], dtype=x.dtype))
    return total / number.clamp(min=1)[:, None]
