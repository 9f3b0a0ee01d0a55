"""Everything that is wrong with manifests and their files, found before it costs anything.

Three passes that hold no row: the rows say which files there are and how they are used; the files are looked at in
worker processes (``check_files.py``); the rows are read again and each is told what is wrong with it, with its files
and with what it shares with others. Errors go to the quarantine list, which training leaves out; warnings to the
report. Rows that no such list can set aside have to be mended: the report names their lines.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

from avllm.data.check.file import Use, thumbnail
from avllm.data.check.files import OVERHEAD_SECONDS, Files, Looking, Uses, gather, media_of, remembered, same_bytes
from avllm.data.check.page import write_page
from avllm.data.check.reasons import MENDED, REASONS, Finding
from avllm.data.check.report import EXAMPLES, Report
from avllm.data.check.rows import Ids, Line, TestRows, lines, listable, text_problems
from avllm.data.manifest import ManifestError
from avllm.data.schema import RowError, Sample
from avllm.data.store.storage import local_path

SAME_FILE = 5  # examples before which rows about a file that is shown already are shown too
SLOWEST = 5
UNSHOWABLE = {"missing", "unreachable", "timeout", "crashed"}  # reasons of files of which there is no picture


class Tokens(Protocol):
    """Counts a row's tokens."""

    def __call__(self, sample: Sample, media: Sequence[dict[str, int]]) -> int:
        """Tokens of a row whose media parts take ``media`` tokens by stream.

        Raises:
            RowError: no training row can be made of it.
        """
        ...


def check(
    manifests: Sequence[Path],
    *,
    looking: Looking | None = None,
    against: Sequence[Path] = (),
    tokens: Tokens | None = None,
    output: Path | None = None,
) -> Report:
    """Check manifests and their files.

    Args:
        manifests: JSONL files.
        looking: how files are looked at.
        against: manifests of test rows, none of which may occur among the others.
        tokens: counts a row's tokens; None counts none.
        output: folder for ``check.json``, ``check.html``, ``quarantine.txt`` (id, tab, reasons: the rows with errors
            that a list can set aside),
            ``findings.jsonl`` (everything) and ``journal.jsonl``, out of which an interrupted check goes on.

    Raises:
        ManifestError: a manifest is no file, or was written to meanwhile. StoreError: the output is a URL.
        CheckError: its journal is damaged.
    """
    began, looking = time.monotonic(), looking or Looking()
    manifests = list(dict.fromkeys(manifests))
    if output is not None:
        output = local_path(output)
        output.mkdir(parents=True, exist_ok=True)
    ids, test = Ids(), TestRows()
    uses, test_uses = gather(ids.counting(lines(manifests))), gather(test.noting(lines(against)))
    files = Files(looking, None if output is None else output / "journal.jsonl")
    files.look(uses)
    judge = Judge(files, uses, ids, test, test_uses, tokens)
    report = Report(files=len(files), reused=files.reused)
    with ExitStack() as stack:
        sinks = [stack.enter_context(_whole(output / name)) for name in SINKS] if output is not None else []
        for line in test.malformed:
            found = Finding(line.id, str(line.manifest), line.number, "", "malformed_test", line.error)
            _tell(report, "(test rows)", line, [found], sinks)
        for line in lines(manifests):
            report.rows[str(line.manifest)] += 1
            source = "(malformed)" if line.sample is None else line.sample.source
            report.sources[source]["rows"] += 1
            _tell(report, source, line, judge.findings(line, report), sinks)
    _facts(report, files)
    if output is not None:
        report.thumbnails = _pictures(report, files)
    report.seconds = time.monotonic() - began
    if output is not None:
        text = json.dumps(report.to_dict(), indent=2, ensure_ascii=False)
        (output / "check.json").write_text(text + "\n", encoding="utf-8")
        write_page(report, output / "check.html")
    return report


SINKS = ("quarantine.txt", "findings.jsonl")


@contextmanager
def _whole(path: Path) -> Iterator[IO[str]]:
    """A text file that appears when it is complete."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        yield file
    partial.replace(path)


class Judge:
    """What is wrong with a row, given all files.

    Args:
        files: what was found out about them.
        uses: how rows use them.
        ids: of all rows.
        test: rows that must not occur; test_files: their files.
        tokens: counts a row's tokens, or None.
    """

    def __init__(
        self,
        files: Files,
        uses: Uses,
        ids: Ids,
        test: TestRows,
        test_files: Uses,
        tokens: Tokens | None,
    ) -> None:
        self.files, self.uses, self.ids, self.test, self.tokens = files, uses, ids, test, tokens
        hashes = same_bytes({**uses, **test_files}, files.looking.workers, files.journal)
        self.shown_in_test = {hashes[p]: p for p in test_files if p in hashes}
        self.test_files = test_files
        first: dict[str, str] = {}
        self.twins = {p: twin for p in uses if p in hashes and (twin := first.setdefault(hashes[p], p)) != p}
        self.hashes = hashes

    def findings(self, line: Line, report: Report) -> list[Finding]:
        """Everything about one line; its tokens go into the report's values."""
        sample = line.sample
        found: list[tuple[str, str, str | None]] = [(*each, None) for each in self.ids.problems(line)]
        if sample is None:
            found.append(("malformed", line.error, None))
            return [self._finding(line, *each) for each in found]
        found += [(*each, None) for each in (*text_problems(sample), *self.test.problems(sample))]
        places = media_of(line)
        media = [self._use(line, path, use) for path, use in places]
        for (path, _), seen in zip(places, media, strict=True):
            found += [(reason, detail, path) for reason, detail in (*seen["problems"], *self._shared(path))]
        if self.tokens is not None and not any(REASONS[reason].severity == "error" for reason, _, _ in found):
            found += [(*each, None) for each in self._length(sample, media, report)]
        return [self._finding(line, *each) for each in dict.fromkeys(found)]

    @staticmethod
    def _finding(line: Line, reason: str, detail: str, path: str | None) -> Finding:
        source = "" if line.sample is None else line.sample.source
        return Finding(line.id, str(line.manifest), line.number, source, reason, detail, path)

    def _use(self, line: Line, path: str, use: Use) -> dict[str, Any]:
        if use not in self.uses.get(path, ()):
            where = f"{line.manifest} line {line.number}"
            raise ManifestError(f"{where} is another row than when the check began; check it again when it is whole")
        found = self.files[path]
        mine: dict[str, Any] = found["uses"][self.uses[path].index(use)]
        return {**mine, "problems": [*mine["problems"], *found["problems"]]}

    def _shared(self, path: str) -> Iterator[tuple[str, str]]:
        if path in self.test_files:
            yield "test_media", "a test row names the same file"
        elif path in self.hashes and self.hashes[path] in self.shown_in_test:
            yield "test_media", f"the same bytes as {self.shown_in_test[self.hashes[path]]}"
        twin = self.twins.get(path)
        if twin is not None and os.path.realpath(twin) != os.path.realpath(path):  # a link is no other file
            yield "duplicate_media", f"the same bytes as {twin}"

    def _length(self, sample: Sample, media: list[dict[str, Any]], report: Report) -> Iterator[tuple[str, str]]:
        assert self.tokens is not None
        try:
            count = self.tokens(sample, [use.get("tokens", {}) for use in media])
        except RowError as error:
            yield error.reason, error.detail
        else:
            report.values["tokens"].append(count)


def _tell(report: Report, source: str, line: Line, found: list[Finding], sinks: list[IO[str]]) -> None:
    """Count what was found about a line and write it down."""
    report.sources[source].update({f.severity for f in found})
    for reason in dict.fromkeys(f.reason for f in found):
        report.reasons[reason] += 1
    for finding in found:
        shown = report.examples[finding.reason]
        known = finding.path is not None and finding.path in {f.path for f in shown}
        if len(shown) < (SAME_FILE if known else EXAMPLES):
            shown.append(finding)
    errors = list(dict.fromkeys(f.reason for f in found if f.severity == "error"))
    listed = errors and listable(line.id) and not MENDED.intersection(errors)
    if errors and not listed:
        report.to_mend[str(line.manifest)].append(line.number)
    if sinks:
        quarantine, everything = sinks
        if listed:
            quarantine.write(f"{line.id}\t{','.join(errors)}\n")
        everything.writelines(json.dumps({"severity": f.severity, **vars(f)}, ensure_ascii=False) + "\n" for f in found)


def _facts(report: Report, files: Files) -> None:
    """Figures of all files for the histograms."""
    names = {"seconds": "seconds", "frames": "frames", "level_db": "sound level"}
    for path, found in files:
        for use in found["uses"]:
            for key in names.keys() & use.keys():
                report.values[names[key]].append(use[key])
        report.slowest = sorted([*report.slowest, (found.get("seconds", 0.0), path)], reverse=True)[:SLOWEST]


def _pictures(report: Report, files: Files) -> dict[str, str]:
    """Thumbnails of the files in the report's examples."""
    every = (f for found in report.examples.values() for f in found)
    wanted = dict.fromkeys(f.path for f in every if f.path and f.reason not in UNSHOWABLE)
    seconds = 2 * files.looking.reader.timeout + OVERHEAD_SECONDS
    found = remembered("thumbnails", thumbnail, wanted, files.looking.workers, files.journal, seconds)
    return {path: data for path, data in found.items() if data}
