"""Hold a check's results: the one value that the check writes and that page and tables show."""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from avllm.data.check.reasons import REASONS, Finding, Severity

EXAMPLES = 20  # findings of a reason that the report shows; findings.jsonl has all
EXAMPLES_OF_A_FILE = 5  # findings of a reason about one file that are shown before other files'
MISTAKES = 20  # of a reason that are counted apart
OTHERS = "other mistakes"
FIRST_LINES = 5  # of a mistake that the report names


@dataclass
class MistakeRows:
    """Count the rows with one mistake.

    Attributes:
        rows: how many.
        first: locations of the first of them.
    """

    rows: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, location: str) -> None:
        """Count a row."""
        self.rows += 1
        if len(self.first) < FIRST_LINES:
            self.first.append(location)

    def where(self) -> str:
        """Name the first rows, and say how many there are beside them."""
        more = self.rows - len(self.first)
        return ", ".join(self.first) + (f" and {more:,} more" if more else "")


@dataclass
class CheckReport:
    """Count the findings of a check.

    Attributes:
        rows: by manifest.
        files: distinct ones.
        reused: files whose results came from the journal.
        reasons: how many rows have each reason.
        mistakes: of each reason, its rows by mistake; one without a name where there is one kind.
        examples: the first findings of each reason.
        to_fix: line numbers, by manifest, of rows with errors that no quarantine list can set
            aside.
        sources: by source: rows, rows with errors, rows with warnings.
        values: of the histograms: seconds, frames and sound level (dB) of the clips, tokens of the
            rows.
        thumbnails: JPEGs in base64 of files with problems.
        slowest: seconds of one core, and file.
        seconds: that the check took.
    """

    rows: Counter[str] = field(default_factory=Counter)
    files: int = 0
    reused: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    mistakes: dict[str, dict[str, MistakeRows]] = field(default_factory=lambda: defaultdict(dict))
    examples: dict[str, list[Finding]] = field(default_factory=lambda: defaultdict(list))
    to_fix: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    sources: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    values: dict[str, array[float]] = field(
        default_factory=lambda: defaultdict(lambda: array("f")),
    )
    thumbnails: dict[str, str] = field(default_factory=dict)
    slowest: list[tuple[float, str]] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, source: str, findings: Sequence[Finding]) -> None:
        """Count the findings of one row, and keep some as examples."""
        self.sources[source].update({finding.severity for finding in findings})
        by_reason = {finding.reason: finding for finding in findings}
        self.reasons.update(by_reason.keys())
        for finding in by_reason.values():
            self._count_mistake(finding)
        for finding in findings:
            examples = self.examples[finding.reason]
            if len(examples) < self._most_examples(finding):
                examples.append(finding)

    def _count_mistake(self, finding: Finding) -> None:
        """Count a row by its mistake; after many mistakes, further ones count as one."""
        mistakes = self.mistakes[finding.reason]
        name = finding.mistake
        if name not in mistakes and len(mistakes) >= MISTAKES:
            name = OTHERS
        mistakes.setdefault(name, MistakeRows()).add(finding.location)

    def _most_examples(self, finding: Finding) -> int:
        """Return how many examples the reason may have before this finding is left out."""
        shown_paths = {example.path for example in self.examples[finding.reason]}
        same_file = finding.path is not None and finding.path in shown_paths
        return EXAMPLES_OF_A_FILE if same_file else EXAMPLES

    def count(self, severity: Severity) -> int:
        """Return the number of rows with a finding of this severity."""
        return sum(counts[severity] for counts in self.sources.values())

    def ranked(self) -> list[str]:
        """Return the reasons: errors first, then by how many rows have them."""
        return sorted(self.reasons, key=lambda r: (REASONS[r].severity, -self.reasons[r]))

    def advice(self) -> list[str]:
        """Name the rows that have to be fixed by hand, a sentence for each manifest."""
        sentences = []
        for manifest, numbers in self.to_fix.items():
            first = ", ".join(map(str, numbers[:EXAMPLES]))
            more = f" and {len(numbers) - EXAMPLES} more" if len(numbers) > EXAMPLES else ""
            word = "line" if len(numbers) == 1 else "lines"
            sentences.append(
                "fix these lines by hand (malformed, or without a unique id): "
                f"{manifest} {word} {first}{more}"
            )
        return sentences

    def to_dict(self) -> dict[str, Any]:
        """Return the content of ``check.json``."""
        reasons = {}
        for reason in self.ranked():
            reasons[reason] = {
                "severity": REASONS[reason].severity,
                "rows": self.reasons[reason],
            }
        mistakes = {}
        for reason, rows_by_mistake in self.mistakes.items():
            mistakes[reason] = {name: vars(rows) for name, rows in rows_by_mistake.items()}
        examples = {}
        for reason, findings in self.examples.items():
            examples[reason] = [vars(finding) for finding in findings]
        return {
            "rows": dict(self.rows),
            "files": self.files,
            "files_from_journal": self.reused,
            "rows_with_errors": self.count("error"),
            "rows_with_warnings": self.count("warning"),
            "reasons": reasons,
            "mistakes": mistakes,
            "to_fix": dict(self.to_fix),
            "sources": {source: dict(counts) for source, counts in self.sources.items()},
            "summary": {name: summary(values) for name, values in self.values.items()},
            "examples": examples,
            "slowest": self.slowest,
            "seconds": round(self.seconds, 1),
        }


def summary(values: Sequence[float]) -> dict[str, float]:
    """Return count, least, median, greatest and sum of some numbers."""
    ordered = sorted(values)
    figures = {
        "count": len(ordered),
        "min": ordered[0],
        "median": ordered[len(ordered) // 2],
        "max": ordered[-1],
        "sum": sum(ordered),
    }
    return {name: round(value, 3) for name, value in figures.items()}
