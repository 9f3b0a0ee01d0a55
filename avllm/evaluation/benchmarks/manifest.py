"""Any manifest as a benchmark: its rows as they stand, scored by their form. The default."""

from __future__ import annotations

from pathlib import Path

from avllm.data.manifest import ManifestError, read_manifest
from avllm.data.schema import Sample
from avllm.errors import UserError
from avllm.evaluation.benchmarks.base import Benchmark, Score, score_by_form


class Manifest(Benchmark):
    """The rows of a manifest (JSONL).

    Args:
        path: the file.
        limit: at most so many rows, spread evenly over the file.
        refusal: the answer by which a question is refused; a row's ``meta.refusal`` goes before it.
    """

    def __init__(self, *, path: str, limit: int | None = None, refusal: str = "unanswerable") -> None:
        self.path, self.limit, self.refusal = Path(path), limit, refusal

    def samples(self) -> list[Sample]:
        """All rows, or ``limit`` of them.

        Raises:
            ManifestError: malformed, or a row without an answer to score against.
        """
        rows = read_manifest(self.path)
        mute = next((r.id for r in rows if not (r.answer or "").strip()), None)
        if mute is not None:
            raise ManifestError(f"{self.path}: row {mute!r} has no answer; evaluation needs the truth as last turn")
        return spread(rows, self.limit)

    @property
    def root(self) -> Path:
        """The manifest's folder."""
        return self.path.parent

    def score(self, sample: Sample, answer: str, duration: float) -> Score:
        """By the row's form."""
        return score_by_form(sample, answer, duration, self.refusal)


def spread(rows: list[Sample], limit: int | None) -> list[Sample]:
    """``limit`` rows at even distances, so that a sorted file still gives a fair picture."""
    if limit is None or limit >= len(rows):
        return rows
    if limit < 1:
        raise UserError(f"limit is {limit}; expected at least 1 row")
    return [rows[i * len(rows) // limit] for i in range(limit)]
