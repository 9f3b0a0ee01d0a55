"""Score captions against one or several references: token F1 of each, BLEU-4 over all."""

from __future__ import annotations

from collections.abc import Sequence

from avllm.data.schema import Sample
from avllm.evaluation.benchmarks.base import Prediction, Score, truths
from avllm.evaluation.benchmarks.manifest import ManifestRows
from avllm.evaluation.scoring.metrics import corpus_bleu, token_f1


class Captions(ManifestRows):
    """Rows of a manifest whose answers are captions; further references are in ``answers``.

    Args:
        data: the manifest (JSONL).
    """

    def __init__(self, *, data: str) -> None:
        super().__init__(path=data)

    def score(self, sample: Sample, answer: str, duration: float) -> Score:
        """Score by the best reference: ``token_f1``, 0 to 1."""
        return Score(values={"token_f1": token_f1(answer, truths(sample))})

    def figures(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        """Return ``bleu4`` (Papineni et al. 2002) over all answers, 0 to 1."""
        answers = [p.answer for p in predictions]
        return {"bleu4": corpus_bleu(answers, [truths(p.sample) for p in predictions])}
