"""Find the errors of manifests and their files before training does.

Three passes, none of which holds all rows: the rows say which files there are and how they use
them; worker processes examine the files (``files.py``); the rows are read again, and each gets its
findings: about itself, its files, and what it shares with other rows. Rows with errors go to the
quarantine list, which training leaves out; warnings go to the report. The report names the lines of
rows that no such list can name, since they have to be fixed by hand.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from avllm.data.boundary import one_row
from avllm.data.check.file import thumbnail
from avllm.data.check.files import (
    OVERHEAD_SECONDS,
    ExamineOptions,
    Files,
    Uses,
    gather,
    media_of,
    remembered,
    same_bytes,
)
from avllm.data.check.lists import row_lists
from avllm.data.check.page import write_page
from avllm.data.check.reasons import REASONS, Finding, Problem
from avllm.data.check.report import CheckReport
from avllm.data.check.rows import Ids, Line, TestRows, lines, text_problems
from avllm.data.check.uses import Use, duration_of_use
from avllm.data.manifest import ManifestError
from avllm.data.media.load import MediaError
from avllm.data.schema import RowError, Sample
from avllm.data.store.storage import local_path

SLOWEST = 5  # files that the report names
UNSHOWABLE = {"missing", "unreachable", "timeout", "crashed"}  # no picture can be read of these
HISTOGRAMS = {"seconds": "seconds", "frames": "frames", "level_db": "sound level"}
"""Figures of a file's uses, and the histograms that show them."""


class TokenCounter(Protocol):
    """Count a row's tokens."""

    def __call__(
        self,
        sample: Sample,
        media: Sequence[dict[str, int]],
        durations: Sequence[float | None],
    ) -> int:
        """Return the tokens of a row.

        Args:
            sample: the row.
            media: tokens by stream that each media part takes.
            durations: seconds of each media part, None where not known.

        Raises:
            RowError: no training row can be made of it.
        """
        ...

    def control_words(self, sample: Sample) -> list[str]:
        """Return the LLM's control tokens that the row's texts hold."""
        ...


def check(
    manifests: Sequence[Path],
    *,
    options: ExamineOptions | None = None,
    against: Sequence[Path] = (),
    tokens: TokenCounter | None = None,
    output: Path | None = None,
    licences: bool = False,
) -> CheckReport:
    """Check manifests and their files.

    Args:
        manifests: JSONL files.
        options: how files are examined.
        against: manifests of test rows, none of which may occur among the others.
        tokens: counts a row's tokens; None counts none.
        output: folder for ``check.json``, ``check.html``, ``findings.jsonl`` (all findings),
            ``quarantine.txt`` (id, tab, reasons: the rows with errors that a list can name) and
            ``journal.jsonl``, with which an interrupted check continues.
        licences: warn of rows that name no licence.

    Raises:
        ManifestError: a manifest is no file, or was changed meanwhile. StoreError: the output is a
            URL. CheckError: its journal is damaged.
    """
    began = time.monotonic()
    manifests = list(dict.fromkeys(manifests))
    if output is not None:
        output = local_path(output)
        output.mkdir(parents=True, exist_ok=True)
    ids = Ids()
    test = TestRows()
    uses = gather(ids.counting(lines(manifests)))
    test_uses = gather(test.adding(lines(against)))
    files = Files(options or ExamineOptions(), None if output is None else output / "journal.jsonl")
    files.examine(uses)
    judge = Judge(files, uses, ids, test, test_uses, tokens, licences)
    report = CheckReport(files=len(files), reused=files.reused)
    _judge_rows(judge, manifests, report, output)
    _add_figures(report, files)
    if output is not None:
        report.thumbnails = _thumbnails(report, files)
    report.seconds = time.monotonic() - began
    if output is not None:
        text = json.dumps(report.to_dict(), indent=2, ensure_ascii=False)
        (output / "check.json").write_text(text + "\n", encoding="utf-8")
        write_page(report, output / "check.html")
    return report


def _judge_rows(
    judge: Judge,
    manifests: Sequence[Path],
    report: CheckReport,
    output: Path | None,
) -> None:
    """Read the rows again, and record the findings of each."""
    with row_lists(report, judge.ids, output) as lists:
        for line in judge.test.malformed:
            reason = "malformed_test" if line.reason == "malformed" else line.reason
            findings = [_fault(line, reason)]
            report.add("(test rows)", findings)
            lists.add(line, findings)
        for line in lines(manifests):
            source = f"({line.reason})" if line.sample is None else line.sample.source
            if line.number:  # it is 0 for a manifest without rows
                report.rows[str(line.manifest)] += 1
                report.sources[source]["rows"] += 1
            findings = judge.findings(line, report)
            report.add(source, findings)
            lists.add(line, findings)


def _finding(line: Line, problem: Problem, path: str | None = None) -> Finding:
    source = "" if line.sample is None else line.sample.source
    return Finding(
        line.id,
        str(line.manifest),
        line.number,
        source,
        problem.reason,
        problem.detail,
        path,
    )


def _fault(line: Line, reason: str) -> Finding:
    """Return the finding about a line that is no row."""
    return replace(_finding(line, Problem(reason, line.error)), mistake=line.mistake)


class Judge:
    """Find the errors and oddities of rows, given the results of all files.

    Args:
        files: their results.
        uses: how rows use them.
        ids: of all rows.
        test: rows that must not occur.
        test_uses: how test rows use their files.
        tokens: counts a row's tokens, or None.
        licences: warn of rows that name none.
    """

    def __init__(
        self,
        files: Files,
        uses: Uses,
        ids: Ids,
        test: TestRows,
        test_uses: Uses,
        tokens: TokenCounter | None,
        licences: bool,
    ) -> None:
        self.files = files
        self.uses = uses
        self.ids = ids
        self.test = test
        self.test_paths = test_uses.keys()
        self.tokens = tokens
        self.licences = licences
        all_paths = {**uses, **test_uses}
        self.hashes = same_bytes(all_paths, files.options.workers, files.journal)
        self.test_path_by_hash: dict[str, str] = {}
        for path in test_uses:
            if path in self.hashes:
                self.test_path_by_hash[self.hashes[path]] = path
        self.twins = self._find_twins()

    def _find_twins(self) -> dict[str, str]:
        """Return, for each file whose bytes an earlier file has, that file."""
        first_path: dict[str, str] = {}  # by hash
        twins: dict[str, str] = {}
        for path in self.uses:
            if path not in self.hashes:
                continue
            first = first_path.setdefault(self.hashes[path], path)
            if first != path:
                twins[path] = first
        return twins

    def findings(self, line: Line, report: CheckReport) -> list[Finding]:
        """Return all findings about a line; the report's values get the length of the row."""
        findings = [_finding(line, problem) for problem in self.ids.problems(line)]
        if line.sample is None:
            return [*findings, _fault(line, line.reason)]
        row_problems = [*text_problems(line.sample), *self.test.problems(line.sample)]
        if self.licences and not line.sample.licence:
            row_problems.append(Problem("no_licence", f"source {line.sample.source}"))
        findings += [_finding(line, problem) for problem in row_problems]
        tokens_of_media: list[dict[str, int]] = []
        durations: list[float | None] = []
        for path, use in media_of(line):
            result = self._result_of(line, path, use)
            problems = [*result["problems"], *self._shared_bytes(path)]
            findings += [_finding(line, Problem(*problem), path) for problem in problems]
            tokens_of_media.append(result.get("tokens", {}))
            durations.append(duration_of_use(use, result))
        if not any(finding.severity == "error" for finding in findings):
            length_problems = self._count_tokens(line.sample, tokens_of_media, durations, report)
            findings += [_finding(line, problem) for problem in length_problems]
        return list(dict.fromkeys(findings))

    def _result_of(self, line: Line, path: str, use: Use) -> dict[str, Any]:
        """Return the result of a use, with the problems of the file itself added to its own."""
        if use not in self.uses.get(path, ()):
            raise ManifestError(
                f"{line.location} is another row than when the check began; check the manifest "
                "again when it is complete",
                reason="changed",
            )
        file_result = self.files[path]
        use_result: dict[str, Any] = file_result["uses"][self.uses[path].index(use)]
        problems = [*use_result["problems"], *file_result["problems"]]
        return {**use_result, "problems": problems}

    def _shared_bytes(self, path: str) -> Iterator[Problem]:
        """Yield a problem for a test row's file and for a training row's file with equal bytes."""
        test_path = self.test_path_by_hash.get(self.hashes.get(path, ""))
        if path in self.test_paths:
            yield Problem("test_media", "a test row names the same file")
        elif test_path is not None:
            yield Problem("test_media", f"the same bytes as {test_path}")
        twin = self.twins.get(path)
        # A link to a file is no second file.
        if twin is not None and os.path.realpath(twin) != os.path.realpath(path):
            yield Problem("duplicate_media", f"the same bytes as {twin}")

    def _count_tokens(
        self,
        sample: Sample,
        media: list[dict[str, int]],
        durations: list[float | None],
        report: CheckReport,
    ) -> Iterator[Problem]:
        """Add the length of a row to the report, or yield why it has none."""
        if self.tokens is None:
            return
        try:
            with one_row():
                count = self.tokens(sample, media, durations)
        except (MediaError, RowError) as error:
            if error.reason in REASONS:
                yield Problem(error.reason, str(error))
            else:  # a reason of a part from outside
                yield Problem("unexpected", f"{error.reason}: {error}")
        else:
            report.values["tokens"].append(count)
            words = self.tokens.control_words(sample)
            if words:
                yield Problem("control_text", f"{', '.join(dict.fromkeys(words))}")


def _add_figures(report: CheckReport, files: Files) -> None:
    """Add the figures of all files for the histograms, and the slowest files."""
    for path, result in files:
        for use in result["uses"]:
            for figure, histogram in HISTOGRAMS.items():
                if figure in use:
                    report.values[histogram].append(use[figure])
        report.slowest.append((result.get("seconds", 0.0), path))
        report.slowest = sorted(report.slowest, reverse=True)[:SLOWEST]


def _thumbnails(report: CheckReport, files: Files) -> dict[str, str]:
    """Return pictures of the files in the report's examples."""
    paths: dict[str, None] = {}  # as an ordered set
    for reason, findings in report.examples.items():
        if reason not in UNSHOWABLE:
            paths |= dict.fromkeys(finding.path for finding in findings if finding.path)
    options = files.options
    seconds = 2 * options.reader.timeout + OVERHEAD_SECONDS
    pictures = remembered(
        "thumbnails",
        thumbnail,
        paths,
        options.workers,
        files.journal,
        seconds,
    )
    return {path: picture for path, picture in pictures.items() if picture}
