"""Define a benchmark: samples, their prompt, a score for each answer, figures over all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from avllm.data.schema import Sample
from avllm.errors import UserError
from avllm.evaluation.scoring.answers import pick_choice, time_error
from avllm.evaluation.scoring.metrics import exact_match, token_f1
from avllm.evaluation.scoring.words import normalise
from avllm.registry import build
from avllm.yaml_files import apply_override


@dataclass(frozen=True)
class Score:
    """One answer's score.

    Attributes:
        correct: right or wrong; None where the answer is a time, or is not judged so.
        f1: token F1; None where there are choices or a time.
        error: seconds off; None where the answer is no time.
        is_number: False where a time was asked and the answer named none (worst ``error``).
        refused: the answer is the refusal.
        values: further figures of this answer by name; results hold their means and intervals.
    """

    correct: bool | None = None
    f1: float | None = None
    error: float | None = None
    is_number: bool = True
    refused: bool = False
    values: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Prediction:
    """One row's answer.

    Attributes:
        touched: the condition took a stream of this row away or exchanged one.
        changed: the answer differs from the one to the unchanged row; None where that was not
            asked.
        failed: the row could not be asked, and counts as wrong.
    """

    sample: Sample
    answer: str
    score: Score
    touched: bool = False
    changed: bool | None = None
    failed: bool = False

    def to_dict(self, condition: str) -> dict[str, Any]:
        """Return one line of a predictions file."""
        return {
            "id": self.sample.id,
            "source": self.sample.source,
            "kind": self.sample.kind,
            "condition": condition,
            "answer": self.answer,
            "truth": self.sample.answer,
            "seconds": self.sample.seconds,
            **asdict(self.score),
            "touched": self.touched,
            "changed": self.changed,
            "failed": self.failed,
        }


class Benchmark:
    """Samples, a prompt and a score: one file each; its keyword arguments are its options.

    By convention ``data`` is the folder (or file) to read, in the form that its authors distribute.
    """

    def samples(self) -> list[Sample]:
        """Return the rows, with their answers."""
        raise NotImplementedError(f"{type(self).__name__}.samples")

    @property
    def root(self) -> Path | None:
        """The folder that relative media paths start from."""
        return None

    def prompt(self, sample: Sample) -> Sample:
        """Return the row that is put to the model; by default the sample itself."""
        return sample

    def score(self, sample: Sample, answer: str, duration: float) -> Score:
        """Score one answer.

        Args:
            sample: the row with its truth.
            answer: what the model said.
            duration: seconds of the clip: the error of a time that is no number.
        """
        raise NotImplementedError(f"{type(self).__name__}.score")

    def figures(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        """Return figures by name of a set of answers: a word error rate, BLEU, a macro F1.

        Args:
            predictions: at least one: all rows, or those of one kind or source.
        """
        return {}


def benchmark_of(
    name: str, data: str | Path | None = None, options: Sequence[str] = (), **further: Any
) -> Benchmark:
    """Build a benchmark by its name, or by ``pkg.module:Class``.

    Args:
        data: its option of that name.
        options: further ones, ``key=value`` with the value in YAML.
        further: options by keyword.

    Raises:
        UserError: no such benchmark or option, or data that it cannot read.
    """
    spec: dict[str, Any] = {"type": name, **further}
    if data is not None:
        spec["data"] = str(data)
    for option in options:
        apply_override(spec, option, UserError)
    benchmark: Benchmark = build("benchmarks", spec)
    return benchmark


def truths(sample: Sample) -> list[str]:
    """Return all accepted answers of a row; the first is that of its last turn."""
    return [sample.answer or "", *(sample.answers or [])]


def _choice(text: str, choices: list[str]) -> str:
    """Return the choice that a text means, by letter or by words; without one the text itself."""
    place = pick_choice(text, choices)
    return text if place is None else choices[place]


def score_by_form(sample: Sample, answer: str, duration: float, refusal: str | None) -> Score:
    """Score an answer by the row's fields.

    With ``seconds`` by the absolute error, with ``choices`` as multiple choice, and otherwise by
    exact match and token F1.

    Args:
        sample: the row with its truth.
        answer: what the model said.
        duration: seconds of the clip: the error of a time that is no number.
        refusal: the answer by which a question is refused; ``meta.refusal`` goes before it.
    """
    refusal = sample.meta.get("refusal", refusal)
    refused = refusal is not None and normalise(answer) == normalise(str(refusal))
    if sample.seconds is not None:
        error = time_error(answer, sample.seconds, worst=max(duration, sample.seconds))
        return Score(error=error.seconds, is_number=error.is_number, refused=refused)
    accepted = truths(sample)
    if sample.choices:
        meant = _choice(answer, sample.choices)
        right = [_choice(text, sample.choices) for text in accepted]
        return Score(correct=exact_match(meant, right), refused=refused)
    is_match = exact_match(answer, accepted)
    return Score(correct=is_match, f1=token_f1(answer, accepted), refused=refused)


def failed_score(score: Score) -> Score:
    """Return the score of a row that could not be asked, from that of an empty answer: never right.

    A time's error is that of an answer that names none.
    """
    correct = None if score.correct is None else False
    f1 = None if score.f1 is None else 0.0
    return replace(score, correct=correct, f1=f1, is_number=False, refused=False)
