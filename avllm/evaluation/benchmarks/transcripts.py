"""Score transcripts of speech by the word error rate over a corpus."""

from __future__ import annotations

from collections.abc import Sequence

from avllm.data.schema import Sample
from avllm.evaluation.benchmarks.base import Prediction, Score
from avllm.evaluation.benchmarks.manifest import ManifestRows
from avllm.evaluation.scoring.metrics import edit_distance
from avllm.evaluation.scoring.words import words


class Transcripts(ManifestRows):
    """Rows of a manifest whose answers are transcripts.

    Words are compared without case, punctuation and articles, and ``two`` is ``2``; see
    :func:`avllm.evaluation.scoring.words.words`. Scripts without spaces are counted by characters.

    Args:
        data: the manifest (JSONL).
    """

    def __init__(self, *, data: str) -> None:
        super().__init__(path=data)

    def score(self, sample: Sample, answer: str, duration: float) -> Score:
        """Score one transcript: ``word_errors``, words to change."""
        return Score(values={"word_errors": float(_errors(sample, answer))})

    def figures(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        """Return ``wer``: words to change per word of the references; it can exceed 1."""
        errors = sum(_errors(p.sample, p.answer) for p in predictions)
        spoken = sum(len(words(p.sample.answer or "")) for p in predictions)
        return {"wer": errors / max(1, spoken)}


def _errors(sample: Sample, answer: str) -> int:
    return edit_distance(words(answer), words(sample.answer or ""))
