"""Rows for the tests of `avllm data`, and what a check found of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny import row, text

from avllm.data.check.report import Report


def about(path: Path, id: str, answer: str = "red", **more: Any) -> dict[str, Any]:
    """A row about a clip."""
    media = {"type": "video", "video": str(path)}
    return {**row(id, [media, text("what colour is it ?")], answer), "licence": "CC0-1.0", **more}


def words(id: str, answer: str = "red", question: str = "what ?", **more: Any) -> dict[str, Any]:
    """A row of text alone."""
    return {**row(id, [text(question)], answer), "licence": "CC0-1.0", **more}


def reasons(report: Report) -> dict[str, set[str]]:
    """Of each id."""
    found: dict[str, set[str]] = {}
    for reason, findings in report.examples.items():
        for finding in findings:
            found.setdefault(finding.id, set()).add(reason)
    return found
