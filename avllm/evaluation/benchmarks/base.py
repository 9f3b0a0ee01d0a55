"""What a benchmark is: samples, the prompt that they are asked with, and how an answer is scored."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from avllm.data.schema import Sample
from avllm.evaluation.metrics import exact_match, normalise, pick_choice, time_error, token_f1


@dataclass(frozen=True)
class Score:
    """One answer's score.

    Attributes:
        correct: right or wrong; None where the answer is a time.
        f1: token F1; None where there are choices or a time.
        error: seconds off; None where the answer is no time.
        is_number: False where a time was asked and the answer was none (``error`` is then the worst case).
        refused: the answer is the refusal.
    """

    correct: bool | None
    f1: float | None
    error: float | None
    is_number: bool
    refused: bool


class Benchmark:
    """Samples + prompt + score. A new one is one file; its keyword arguments are its options."""

    def samples(self) -> list[Sample]:
        """The rows, with their answers."""
        raise NotImplementedError(f"{type(self).__name__}.samples")

    @property
    def root(self) -> Path | None:
        """The folder that relative media paths start from."""
        return None

    def prompt(self, sample: Sample) -> Sample:
        """The row as it is put to the model; by default as it stands."""
        return sample

    def score(self, sample: Sample, answer: str, duration: float) -> Score:
        """Score one answer.

        Args:
            sample: the row with its truth.
            answer: what the model said.
            duration: seconds of the clip: the error of a time that is no number.
        """
        raise NotImplementedError(f"{type(self).__name__}.score")


def truths(sample: Sample) -> list[str]:
    """All accepted answers of a row; the first is the row's own."""
    return [sample.answer or "", *(sample.answers or [])]


def _choice(text: str, choices: list[str]) -> str:
    """The choice that a text means (a truth may be given by its letter, as an answer may), or the text itself."""
    place = pick_choice(text, choices)
    return text if place is None else choices[place]


def score_by_form(sample: Sample, answer: str, duration: float, refusal: str) -> Score:
    """The usual score by what the row brings: ``seconds`` -> absolute error, ``choices`` -> multiple choice, else exact
    match and token F1."""
    refused = normalise(answer) == normalise(str(sample.meta.get("refusal", refusal)))
    if sample.seconds is not None:
        error, is_number = time_error(answer, sample.seconds, max(duration, sample.seconds))
        return Score(None, None, error, is_number, refused)
    accepted = truths(sample)
    if sample.choices:
        meant, *right = (_choice(text, sample.choices) for text in (answer, *accepted))
        return Score(exact_match(meant, right), None, None, True, refused)
    return Score(exact_match(answer, accepted), token_f1(answer, accepted), None, True, refused)
