"""Write the lists of a check: all findings, and the rows that training is to leave out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

from avllm.data.check.reasons import UNLISTED, Finding
from avllm.data.check.report import CheckReport
from avllm.data.check.rows import Ids, Line, listable


class BadRow(NamedTuple):
    """Locate a row with errors, and hold their reasons."""

    manifest: str
    line: int
    reasons: list[str]


@dataclass
class RowLists:
    """Write all findings and the quarantine list, and name the rows to fix by hand in the report.

    A quarantine list names rows by their ids alone. So rows whose id occurs again wait until all
    rows are known: the id is listed once; where another row with it has no errors, which training
    would lose, the bad rows are to be fixed by hand.

    Attributes:
        report: gets the lines to fix by hand.
        ids: of all rows.
        quarantine: the open list; None writes none.
        findings: the open file; None writes none.
    """

    report: CheckReport
    ids: Ids
    quarantine: IO[str] | None = None
    findings: IO[str] | None = None
    _waiting: dict[str, list[BadRow]] = field(default_factory=dict)
    _without_errors: set[str] = field(default_factory=set)

    def add(self, line: Line, findings: Sequence[Finding]) -> None:
        """Write the findings of a line, and list it if it has errors."""
        if self.findings is not None:
            for finding in findings:
                entry = {"severity": finding.severity, **vars(finding)}
                self.findings.write(json.dumps(entry, ensure_ascii=False) + "\n")
        errors = list(dict.fromkeys(f.reason for f in findings if f.severity == "error"))
        bad = BadRow(str(line.manifest), line.number, errors)
        if not errors:
            if self.ids.occurs_again(line.id):
                self._without_errors.add(line.id)
        elif not listable(line.id) or not UNLISTED.isdisjoint(errors):
            self._fix_by_hand(bad)
        elif self.ids.occurs_again(line.id):
            self._waiting.setdefault(line.id, []).append(bad)
        else:
            self._set_aside(line.id, errors)

    def finish(self) -> None:
        """List the rows that wait."""
        for identity, rows in self._waiting.items():
            reasons: dict[str, None] = {}  # as an ordered set
            for bad in rows:
                reasons |= dict.fromkeys(bad.reasons)
                if identity in self._without_errors:
                    self._fix_by_hand(bad)
            if identity not in self._without_errors:
                self._set_aside(identity, reasons)
        for numbers in self.report.to_fix.values():
            numbers.sort()

    def _set_aside(self, identity: str, reasons: Iterable[str]) -> None:
        if self.quarantine is not None:
            self.quarantine.write(f"{identity}\t{','.join(reasons)}\n")

    def _fix_by_hand(self, bad: BadRow) -> None:
        if bad.line:  # a manifest without rows has no line to fix
            self.report.to_fix[bad.manifest].append(bad.line)


@contextmanager
def row_lists(report: CheckReport, ids: Ids, output: Path | None) -> Iterator[RowLists]:
    """Open the lists in an output folder, or lists that write no file; they end complete."""
    if output is None:
        lists = RowLists(report, ids)
        yield lists
        lists.finish()
        return
    with (
        _open_whole(output / "quarantine.txt") as quarantine,
        _open_whole(output / "findings.jsonl") as findings,
    ):
        lists = RowLists(report, ids, quarantine, findings)
        yield lists
        lists.finish()


@contextmanager
def _open_whole(path: Path) -> Iterator[IO[str]]:
    """Open a text file that gets its name when it is complete."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        yield file
    partial.replace(path)
