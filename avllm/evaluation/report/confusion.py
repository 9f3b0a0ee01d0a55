"""Count which answers are given in the place of which truths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from avllm.data.schema import Sample
from avllm.evaluation.benchmarks.base import Prediction
from avllm.evaluation.scoring.answers import pick_choice
from avllm.evaluation.scoring.words import normalise

MOST_LABELS = 16
"""Truths that a matrix has room for; with more, choices are counted by their letters."""
OTHER = "(other)"
NOT_ASKED = "(not asked)"


@dataclass(frozen=True)
class Confusion:
    """Count answers by truth.

    Attributes:
        truths: of the rows, the most frequent first.
        answers: the truths, and what is none of them.
        counts: by truth and answer.
    """

    truths: list[str]
    answers: list[str]
    counts: dict[tuple[str, str], int]

    def of_truth(self, truth: str) -> int:
        """Return the number of rows with a truth."""
        return sum(self.counts.get((truth, answer), 0) for answer in self.answers)


def confusion(predictions: Sequence[Prediction]) -> Confusion | None:
    """Return the confusion matrix of rows of a kind; None where truths are free texts or times."""
    judged = [p for p in predictions if p.score.correct is not None]
    if not judged:
        return None
    by_letter = len({truth_of(p.sample) for p in judged}) > MOST_LABELS
    if by_letter and not all(p.sample.choices for p in judged):
        return None
    pairs: Counter[tuple[str, str]] = Counter()
    truths: Counter[str] = Counter()
    for prediction in judged:
        truth = truth_of(prediction.sample, by_letter)
        truths[truth] += 1
        pairs[truth, answer_of(prediction, by_letter)] += 1
    if len(truths) < 2 or len(truths) > MOST_LABELS:
        return None
    rows = [truth for truth, _ in sorted(truths.items(), key=lambda item: (-item[1], item[0]))]
    known = dict.fromkeys(rows)
    counts: Counter[tuple[str, str]] = Counter()
    for (truth, answer), count in pairs.items():
        counts[truth, answer if answer in known or answer == NOT_ASKED else OTHER] += count
    further = [name for name in (OTHER, NOT_ASKED) if any(a == name for _, a in counts)]
    return Confusion(rows, [*rows, *further], dict(counts))


def truth_of(sample: Sample, by_letter: bool = False) -> str:
    """Return a row's truth in the form in which answers are compared, or its letter."""
    truth = sample.answer or ""
    place = pick_choice(truth, sample.choices) if sample.choices else None
    if place is None or sample.choices is None:
        return normalise(truth)
    return _letter(place) if by_letter else normalise(sample.choices[place])


def answer_of(prediction: Prediction, by_letter: bool = False) -> str:
    """Return an answer in the form of :func:`truth_of`."""
    sample = prediction.sample
    if prediction.failed:
        return NOT_ASKED
    if prediction.score.correct:
        return truth_of(sample, by_letter)
    if not sample.choices:
        return normalise(prediction.answer)
    place = pick_choice(prediction.answer, sample.choices)
    if place is None:
        return OTHER
    return _letter(place) if by_letter else normalise(sample.choices[place])


def _letter(place: int) -> str:
    return chr(ord("A") + place) if place < 26 else str(place + 1)
