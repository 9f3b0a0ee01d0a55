"""Ask the rows of any manifest unchanged, and score them by their form. The default."""

from __future__ import annotations

from pathlib import Path

from avllm.data.manifest import ManifestError, read_manifest
from avllm.data.schema import Sample
from avllm.evaluation.benchmarks.base import Benchmark, Score, score_by_form


class ManifestRows(Benchmark):
    """Ask the rows of a manifest (JSONL) unchanged.

    Args:
        path: the file.
        refusal: the answer by which a question is refused; a row's ``meta.refusal`` goes before it.
    """

    def __init__(self, *, path: str, refusal: str = "unanswerable") -> None:
        self.path = Path(path)
        self.refusal = refusal

    def samples(self) -> list[Sample]:
        """Return all rows.

        Raises:
            ManifestError: malformed, or a row without an answer to score against.
        """
        rows = read_manifest(self.path)
        for row in rows:
            if not (row.answer or "").strip():
                raise ManifestError(
                    f"{self.path}: row {row.id!r} has no answer; "
                    "expected the truth as the last turn: evaluation needs it"
                )
        return rows

    @property
    def root(self) -> Path:
        """The manifest's folder."""
        return self.path.parent

    def score(self, sample: Sample, answer: str, duration: float) -> Score:
        """Score by the row's fields."""
        return score_by_form(sample, answer, duration, self.refusal)
