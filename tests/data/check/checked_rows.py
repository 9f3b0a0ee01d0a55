"""Make rows for the tests of `avllm data`, and read the reasons of a check."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny import row, text

from avllm.data.check.report import CheckReport


def about(path: Path, id: str, answer: str = "red", **more: Any) -> dict[str, Any]:
    """Return a row about a clip."""
    media = {"type": "video", "video": str(path)}
    return {**row(id, [media, text("what colour is it ?")], answer), "licence": "CC0-1.0", **more}


def words(id: str, answer: str = "red", question: str = "what ?", **more: Any) -> dict[str, Any]:
    """Return a row of text alone."""
    return {**row(id, [text(question)], answer), "licence": "CC0-1.0", **more}


def reasons(report: CheckReport) -> dict[str, set[str]]:
    """Return the reasons of each row, by id."""
    reasons_by_id: dict[str, set[str]] = {}
    for reason, findings in report.examples.items():
        for finding in findings:
            reasons_by_id.setdefault(finding.id, set()).add(reason)
    return reasons_by_id


def reasons_of(result: dict[str, Any]) -> list[str]:
    """Return the reasons of a file's result, or of a use's."""
    return [reason for reason, _ in result["problems"]]
