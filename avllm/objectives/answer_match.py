"""Match clip and question with the answer, among the answers of the batch.

It is visual question answering as retrieval of the answer's text (the answer-embedding head of Hu
et al. 2018, arXiv 1806.03724). Only the word embeddings of the LLM are used: a step costs a
fraction of one through the LLM, and the gradient of every question has a short path to the
connector.
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
from avllm.precision import at_least_float32

if TYPE_CHECKING:
    from avllm.data.collate import Batch, BatchParts, Places
    from avllm.tokens import Tokens


@dataclass(frozen=True)
class Questions:
    """Hold the n questions of a batch: its parts that have a kind and an answer.

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
        """Group vectors of questions ``(n, D)`` by set of clips, ``(S, Q, D)``, padded with 0."""
        most = int(self.place.max()) + 1 if len(self.place) else 1
        padded = x.new_zeros(self.sets, most, x.shape[-1])
        return padded.index_put((self.clip_set, self.place), x)


def match_loss(
    asked: Tensor, answers: Tensor, own: Tensor, scale: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy of each question's answer, and how many are matched best.

    Args:
        asked: ``(n, D)`` unit vectors of clip and question.
        answers: ``(m, D)`` unit vectors of the distinct answers.
        own: ``(n,)`` long, the number of each question's answer.
        scale: inverse temperature.
    """
    logits = scale * asked @ answers.T  # (n, m)
    if not len(own):  # a zero that depends on the parameters
        zero = logits.sum()
        return zero, zero.detach()
    hits = (logits.detach().argmax(-1) == own).float().sum()
    return F.cross_entropy(logits, own, reduction="sum"), hits


def find_questions(parts: BatchParts) -> Questions:
    """Find the parts that ask something and have an answer."""
    asks = [part.is_question and part.role in ("answer", "chosen") for part in parts.items]
    chosen = parts.is_true(asks) & parts.has_target  # bool, one a part
    clip_set = parts.clip_set[chosen]  # (n,)
    answers: dict[str, int] = {}  # the number of each distinct answer
    first: list[int] = []
    numbers: list[int] = []
    for part, is_chosen in zip(parts.items, chosen.tolist(), strict=True):
        if not is_chosen:
            continue
        if part.target not in answers:
            answers[part.target] = len(answers)
            first.append(len(numbers))
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

    Parts without a ``kind`` (captions) are left out. The clip is read twice: as the mean of each
    stream's connector tokens, scaled by the question, for facts about the whole clip; and token by
    token, by attention from the question, for facts that a single token carries.

    Args:
        model: an AVLLM; widths and stream names are read from it.
        dim: width of the common space.
        hidden: width inside, a multiple of ``heads``.
        heads: of the attention.
        words: weight of a second loss in the LLM's embedding space: the question's words attend to
            the tokens most similar to them, and the result has to be similar to the answer's words.
            It moves a token towards the sum of the words for its content, which a frozen LLM can
            read. 0 leaves it out.
        temperature: at the start; learned.
    """

    gathers = False

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
        of_clip = width * len(self.streams)
        self.read = nn.Sequential(nn.LayerNorm(of_clip), nn.Linear(of_clip, hidden))
        self.steer = nn.Linear(width, hidden)
        self.heads = heads
        self.ask = nn.Linear(width, hidden)
        self.token_norm = nn.LayerNorm(width)
        self.look_up = nn.Linear(width, 2 * hidden)  # keys and values
        self.asked_projection = nn.Linear(hidden, dim)
        self.answer_projection = nn.Linear(width, dim)
        self.log_temperature = nn.Parameter(torch.tensor([math.log(temperature)]))
        self.words = words
        if words:
            self.figures = ("hits", "hits_by_words")
            # Key and value of one more token, for questions to which no token is similar.
            self.nothing = nn.Parameter(torch.randn(2, width) * width**-0.5)
            self.gate = nn.Linear(width, width)
            self.log_sharpness = nn.Parameter(torch.tensor([math.log(10.0)]))

    def weight(self, batch: Batch) -> float:
        """Count the questions."""
        return float(len(find_questions(batch.parts)))

    def forward(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum the cross-entropy over questions; ``hits``: those matched best with their answer."""
        streams = model.media_tokens(batch)
        questions = find_questions(batch.parts)
        sets = batch.parts.set_clips
        words = self._words(model, batch)  # (R * L, D)
        asked = questions.asked.means(words)  # (n, D)
        answers = questions.trained.means(words)[questions.first]  # (m, D)
        tokens = tokens_by_clip_set(streams, sets) if streams else None  # (S, M, D), (S, M)
        scale = self.log_temperature.clamp(math.log(0.01), 0.0).neg().exp().squeeze()
        normed = F.layer_norm(asked, asked.shape[-1:])
        match = self._match(normed, questions, self._clips(streams, sets), tokens)  # (n, dim)
        projected = _unit(self.answer_projection(answers))  # (m, dim)
        loss, hits = match_loss(match, projected, questions.answer, scale)
        if not self.words or tokens is None:
            return loss, {"hits": hits}
        looked_up = self._look_up(asked, questions, *tokens)
        word_loss, word_hits = match_loss(looked_up, _unit(answers), questions.answer, scale)
        return loss + self.words * word_loss, {"hits": hits, "hits_by_words": word_hits}

    def _match(
        self,
        asked: Tensor,
        questions: Questions,
        clips: Tensor,
        tokens: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """Embed clip and question together, unit vectors ``(n, dim)``.

        Args:
            asked: ``(n, D)`` embeddings of the questions.
            questions: the n questions.
            clips: ``(S, streams * D)`` means of the sets' streams.
            tokens: ``(S, M, D)`` of the sets' clips, and which are real, ``(S, M)``.
        """
        hidden = F.gelu(self.read(clips)[questions.clip_set] * (1 + self.steer(asked)))  # (n, H)
        if tokens is not None:
            hidden = hidden + self._attend(asked, questions, *tokens)
        return _unit(self.asked_projection(hidden))

    def _attend(self, asked: Tensor, questions: Questions, tokens: Tensor, real: Tensor) -> Tensor:
        """Attend from each question to the real tokens of its clips.

        Args:
            asked: ``(n, D)`` embeddings of the questions.
            questions: the n questions.
            tokens: ``(S, M, D)`` of the sets' clips.
            real: ``(S, M)`` bool.

        Returns:
            ``(n, H)``, one vector a question.
        """
        keys_values = self.look_up(self.token_norm(tokens))  # (S, M, 2 * H)
        keys, values = keys_values.unflatten(-1, (2, self.heads, -1)).unbind(2)
        query = questions.by_set(self.ask(asked))  # (S, Q, H)
        query = query.unflatten(-1, (self.heads, -1))  # (S, Q, heads, H')
        scores = at_least_float32(torch.einsum("rqhd,rmhd->rhqm", query, keys))
        scores = scores / query.shape[-1] ** 0.5
        scores = scores.masked_fill(~real[:, None, None], -1e9)
        weights = scores.softmax(-1).to(values.dtype)  # (S, heads, Q, M)
        read = torch.einsum("rhqm,rmhd->rqhd", weights, values).flatten(2)  # (S, Q, H)
        return read[questions.clip_set, questions.place]

    def _look_up(self, asked: Tensor, questions: Questions, tokens: Tensor, real: Tensor) -> Tensor:
        """Average the tokens by their similarity to the question's words, gated by the question.

        Args:
            asked: ``(n, D)`` embeddings of the questions.
            questions: the n questions.
            tokens: ``(S, M, D)`` of the sets' clips.
            real: ``(S, M)`` bool.

        Returns:
            unit vectors ``(n, D)``.
        """
        key, value = self.nothing.unbind()
        keys = at_least_float32(
            torch.cat([tokens, key.expand(len(tokens), 1, -1)], 1)
        )  # (S, M + 1, D)
        values = at_least_float32(torch.cat([tokens, value.expand(len(tokens), 1, -1)], 1))
        query = questions.by_set(_unit(asked))  # (S, Q, D)
        cosines = torch.einsum("rqd,rmd->rqm", query, F.normalize(keys, dim=-1))  # (S, Q, M + 1)
        scores = cosines * self.log_sharpness.exp()
        scores = scores.masked_fill(~F.pad(real, (0, 1), value=True)[:, None], -1e9)
        read = torch.einsum("rqm,rmd->rqd", scores.softmax(-1), values)  # (S, Q, D)
        read = read[questions.clip_set, questions.place]  # (n, D)
        gate = 1 + at_least_float32(self.gate(F.layer_norm(asked, asked.shape[-1:])))
        return _unit(read * gate)

    def _words(self, model: Any, batch: Batch) -> Tensor:
        """Return the LLM's embedding of each token, ``(R * L, D)``; placeholders' mean nothing."""
        table = model.llm.get_input_embeddings()
        placeholders = torch.tensor(list(model.config.media_token_ids.values()), dtype=torch.long)
        media = torch.isin(batch.input_ids, placeholders.to(batch.input_ids.device))  # (R, L)
        with torch.no_grad():
            return table(batch.input_ids.masked_fill(media, 0)).flatten(0, 1)

    def _clips(self, streams: dict[str, Tokens], sets: Places) -> Tensor:
        """Return each stream's mean token, ``(S, streams * D)``; zero for absent streams."""
        width = self.answer_projection.in_features
        absent = next(self.parameters()).new_zeros(sets.count, width)
        means: list[Tensor] = []
        for name in self.streams:
            mean = absent
            if name in streams:
                mean, _ = pool_clip_sets(streams, (name,), sets)  # (S, D)
            means.append(at_least_float32(mean))
        return torch.cat(means, -1)


def _unit(x: Tensor) -> Tensor:
    return F.normalize(at_least_float32(x), dim=-1)
