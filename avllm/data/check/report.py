"""What a check found, counted: the one value that the check writes and that the page and the tables show."""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from avllm.data.check.reasons import REASONS, Finding

EXAMPLES = 20  # findings of a reason that the report shows; findings.jsonl has all


@dataclass
class Report:
    """What a check found.

    Attributes:
        rows: by manifest. files: distinct ones; reused: of them out of the journal.
        reasons: how many rows each reason has; examples: the first findings of each.
        to_mend: by manifest, the lines of rows with errors that no quarantine list can set aside.
        sources: by source: rows, rows with errors, rows with warnings.
        values: of the histograms: seconds, frames and sound level (dB) of the clips, tokens of the rows.
        thumbnails: JPEGs in base64 of files with problems.
        slowest: seconds of one core, and file.
    """

    rows: Counter[str] = field(default_factory=Counter)
    files: int = 0
    reused: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[Finding]] = field(default_factory=lambda: defaultdict(list))
    to_mend: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    sources: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    values: dict[str, array[float]] = field(default_factory=lambda: defaultdict(lambda: array("f")))
    thumbnails: dict[str, str] = field(default_factory=dict)
    slowest: list[tuple[float, str]] = field(default_factory=list)
    seconds: float = 0.0

    def count(self, severity: str) -> int:
        """Rows with a finding of this severity."""
        return sum(c[severity] for c in self.sources.values())

    def ranked(self) -> list[str]:
        """The reasons, errors first, then by how many rows have them."""
        return sorted(self.reasons, key=lambda r: (REASONS[r].severity, -self.reasons[r]))

    def mending(self) -> list[str]:
        """What has to be mended in the manifests themselves, in words."""
        found = []
        for manifest, numbers in self.to_mend.items():
            some = ", ".join(map(str, numbers[:EXAMPLES]))
            more = f" and {len(numbers) - EXAMPLES} more" if len(numbers) > EXAMPLES else ""
            word = "line" if len(numbers) == 1 else "lines"
            found.append(f"no quarantine list can set these rows aside, mend them: {manifest} {word} {some}{more}")
        return found

    def to_dict(self) -> dict[str, Any]:
        """As ``check.json`` holds it."""
        return {
            "rows": dict(self.rows),
            "files": self.files,
            "files_from_journal": self.reused,
            "rows_with_errors": self.count("error"),
            "rows_with_warnings": self.count("warning"),
            "reasons": {r: {"severity": REASONS[r].severity, "rows": self.reasons[r]} for r in self.ranked()},
            "to_mend": dict(self.to_mend),
            "sources": {s: dict(c) for s, c in self.sources.items()},
            "summary": {name: summary(values) for name, values in self.values.items()},
            "examples": {r: [vars(f) for f in found] for r, found in self.examples.items()},
            "slowest": self.slowest,
            "seconds": round(self.seconds, 1),
        }


def summary(values: Sequence[float]) -> dict[str, float]:
    """Least, median, greatest and sum of some numbers."""
    ordered = sorted(values)
    found = {"count": len(ordered), "min": ordered[0], "median": ordered[len(ordered) // 2], "max": ordered[-1]}
    return {name: round(value, 3) for name, value in {**found, "sum": sum(ordered)}.items()}
