"""Answers found by matching: the connector's account of a clip, asked a question, picks one of the batch's answers.

Visual question answering as retrieval of the answer's text (the answer-embedding head of Hu et al. 2018, arXiv
1806.03724): the LLM only lends its word embeddings, so a step costs a fraction of one through the LLM, and every fact
that is asked about has a short way back into the connector.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avllm.objectives._pairs import pool_clip_sets, tokens_by_clip_set
from avllm.objectives.base import Objective

if TYPE_CHECKING:
    from avllm.data.collate import Batch, BatchParts, Places
    from avllm.tokens import Tokens


@dataclass(frozen=True)
class Questions:
    """The n questions of a batch: its parts that have a kind and an answer.

    Attributes:
        clip_set: ``(n,)`` the set of clips that each is about.
        place: ``(n,)`` which of the questions about its set it is.
        sets: S, the number of sets.
        asked, trained: places of each question's and answer's tokens in ``(R * L)``.
        answer: ``(n,)`` the number of its answer among the batch's distinct answers.
        first: ``(m,)`` the first question that has each distinct answer.
    """

    clip_set: Tensor
    place: Tensor
    sets: int
    asked: Places
    trained: Places
    answer: Tensor
    first: Tensor

    def __len__(self) -> int:
        return len(self.clip_set)

    def by_set(self, x: Tensor) -> Tensor:
        """Lay ``(n, D)`` out as ``(S, Q, D)``: the questions about each set side by side, zeros after them."""
        most = int(self.place.max()) + 1 if len(self.place) else 1
        return x.new_zeros(self.sets, most, x.shape[-1]).index_put((self.clip_set, self.place), x)


def match_loss(asked: Tensor, answers: Tensor, own: Tensor, scale: Tensor | float) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each question's own answer among the distinct answers, summed, and how many are matched best.

    Args:
        asked: ``(n, D)`` unit vectors of clip and question; answers: ``(m, D)`` unit vectors.
        own: ``(n,)`` long; scale: inverse temperature.
    """
    logits = scale * asked @ answers.T  # (n, m)
    hits = (logits.argmax(-1) == own).float().sum() if len(own) else logits.sum()
    return F.cross_entropy(logits, own, reduction="sum") if len(own) else logits.sum(), hits.detach()


def find_questions(parts: BatchParts) -> Questions:
    """Find the parts that ask something and have an answer."""
    asks = [part.is_question and part.role in ("answer", "chosen") for part in parts.items]
    chosen = parts.is_true(asks) & parts.has_target  # (n,)
    clip_set = parts.clip_set[chosen]
    items = [part for part, keep in zip(parts.items, chosen.tolist(), strict=True) if keep]
    answers: dict[str, int] = {}  # the number of each distinct answer
    first: list[int] = []
    numbers: list[int] = []
    for number, part in enumerate(items):
        if part.target not in answers:
            answers[part.target] = len(answers)
            first.append(number)
        numbers.append(answers[part.target])
    return Questions(
        clip_set=clip_set,
        place=count_before(clip_set),
        sets=parts.set_clips.count,
        asked=parts.asked.pick(chosen),
        trained=parts.trained.pick(chosen),
        answer=torch.tensor(numbers, dtype=torch.long, device=clip_set.device),
        first=torch.tensor(first, dtype=torch.long, device=clip_set.device),
    )


def count_before(values: Tensor) -> Tensor:
    """Return how often each value comes before its place: ``(n,)`` -> ``(n,)``."""
    equal = values[:, None] == values[None]  # (n, n)
    return equal.tril(-1).sum(1)


class AnswerMatch(Objective):
    """Match (clip, question) with the answer, among the distinct answers of the micro-batch.

    Parts without a ``kind`` (captions) are left out. The clip is read twice: as the mean of each stream's connector
    tokens, scaled by the question, for facts about the whole clip; and token by token, by attention from the question,
    for facts that a single token carries.

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
        """Count the questions."""
        return float(len(find_questions(batch.parts)))

    def forward(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum the cross-entropy over questions; ``hits``: questions whose own answer is matched best."""
        streams = model.media_tokens(batch)
        questions, sets = find_questions(batch.parts), batch.parts.set_clips
        words = self._words(model, batch)  # (R * L, D)
        asked = questions.asked.means(words)  # (n, D)
        answers = questions.trained.means(words)[questions.first]  # (m, D)
        tokens = tokens_by_clip_set(streams, sets) if streams else None  # (S, M, D), (S, M)
        scale = self.log_temperature.clamp(math.log(0.01), 0.0).neg().exp().squeeze()
        normed = F.layer_norm(asked, asked.shape[-1:])
        match = self._match(normed, questions, self._clips(streams, sets), tokens)  # (n, dim)
        loss, hits = match_loss(match, _unit(self.answer_projection(answers)), questions.answer, scale)
        if not self.words or tokens is None:
            return loss, {"hits": hits}
        looked_up = self._look_up(asked, questions, *tokens)
        more, by_words = match_loss(looked_up, _unit(answers), questions.answer, scale)
        return loss + self.words * more, {"hits": hits, "hits_by_words": by_words}

    def _match(
        self, asked: Tensor, questions: Questions, clips: Tensor, tokens: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Embed clip and question together, unit vectors ``(n, dim)``.

        Args:
            asked: ``(n, D)``. clips: ``(S, streams * D)``. tokens: ``(S, M, D)`` and which are real, ``(S, M)``.
        """
        hidden = F.gelu(self.read(clips)[questions.clip_set] * (1 + self.steer(asked)))  # (n, H)
        if tokens is not None:
            hidden = hidden + self._attend(asked, questions, *tokens)
        return _unit(self.asked_projection(hidden))

    def _attend(self, asked: Tensor, questions: Questions, tokens: Tensor, real: Tensor) -> Tensor:
        """Attend from each question ``asked (n, D)`` to the real tokens ``(S, M, D)`` of its clips: ``(n, H)``."""
        keys, values = self.look_up(self.token_norm(tokens)).unflatten(-1, (2, self.heads, -1)).unbind(2)
        query = questions.by_set(self.ask(asked)).unflatten(-1, (self.heads, -1))  # (S, Q, heads, H')
        scores = torch.einsum("rqhd,rmhd->rhqm", query, keys).float() / query.shape[-1] ** 0.5
        scores = scores.masked_fill(~real[:, None, None], -1e9)
        read = torch.einsum("rhqm,rmhd->rqhd", scores.softmax(-1).to(values.dtype), values).flatten(2)  # (S, Q, H)
        return read[questions.clip_set, questions.place]

    def _look_up(self, asked: Tensor, questions: Questions, tokens: Tensor, real: Tensor) -> Tensor:
        """Look up the tokens that are like the question's words, gated by the question: unit vectors ``(n, D)``."""
        key, value = self.nothing.unbind()
        keys = torch.cat([tokens, key.expand(len(tokens), 1, -1)], 1).float()  # (S, M + 1, D)
        values = torch.cat([tokens, value.expand(len(tokens), 1, -1)], 1).float()
        query = questions.by_set(_unit(asked))  # (S, Q, D)
        like = torch.einsum("rqd,rmd->rqm", query, F.normalize(keys, dim=-1)) * self.log_sharpness.exp()
        like = like.masked_fill(~F.pad(real, (0, 1), value=True)[:, None], -1e9)
        read = torch.einsum("rqm,rmd->rqd", like.softmax(-1), values)[questions.clip_set, questions.place]
        return _unit(read * (1 + self.gate(F.layer_norm(asked, asked.shape[-1:])).float()))

    def _words(self, model: Any, batch: Batch) -> Tensor:
        """Return the LLM's embedding of each position, ``(R * L, D)``; of placeholders it means nothing."""
        table = model.llm.get_input_embeddings()
        with torch.no_grad():
            return table(batch.input_ids.clamp(max=table.num_embeddings - 1)).flatten(0, 1)

    def _clips(self, streams: dict[str, Tokens], sets: Places) -> Tensor:
        """Return the mean of each stream's tokens, ``(S, streams * D)``; zeros where a set has none of it."""
        width = self.answer_projection.in_features
        absent = next(self.parameters()).new_zeros(sets.count, width)
        pooled = [pool_clip_sets(streams, (name,), sets)[0] if name in streams else absent for name in self.streams]
        return torch.cat([mean.float() for mean in pooled], -1)


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.float(), dim=-1)
