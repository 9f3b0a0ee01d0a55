"""Ask the rows of any manifest unchanged, and score them by their form. The default."""

from __future__ import annotations

from pathlib import Path

from avllm.data.manifest import ManifestError, read_manifest
from avllm.data.schema import Sample
from avllm.evaluation.benchmarks.base import Benchmark, Score, score_by_form


class Manifest(Benchmark):
    """The rows of a manifest (JSONL).

    Args:
        path: the file.
        refusal: the answer by which a question is refused; a row's ``meta.refusal`` goes before it.
    """

    def __init__(self, *, path: str, refusal: str = "unanswerable") -> None:
        self.path, self.refusal = Path(path), refusal

    def samples(self) -> list[Sample]:
        """Return all rows.

        Raises:
            ManifestError: malformed, or a row without an answer to score against.
        """
        rows = read_manifest(self.path)
        mute = next((r.id for r in rows if not (r.answer or "").strip()), None)
        if mute is not None:
            raise ManifestError(f"{self.path}: row {mute!r} has no answer; evaluation needs the truth as last turn")
        return rows

    @property
    def root(self) -> Path:
        """The manifest's folder."""
        return self.path.parent

    def score(self, sample: Sample, answer: str, duration: float) -> Score:
        """By the row's form."""
        return score_by_form(sample, answer, duration, self.refusal)
