"""Examine all files of some manifests in parallel, with a journal that lets a check continue."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track

from avllm.data.check.file import examine, result_without_decode
from avllm.data.check.rows import Line
from avllm.data.check.uses import Decode, FileJob, PartReader, PlainReader, Use
from avllm.data.check.workers import Lost, run_guarded
from avllm.data.schema import resolve_path
from avllm.data.store.access import AccessError
from avllm.data.store.append_only import AppendOnly, read_whole_rows
from avllm.data.store.http import FetchError
from avllm.data.store.storage import StoreError, byte_range_of, sha256, size_of, url_of
from avllm.errors import OutageError, UserError

Uses = Mapping[str, tuple[Use, ...]]
"""The distinct ways in which rows use each file."""
OVERHEAD_SECONDS = 10.0  # a file may take beside decoding: a slow network, a busy machine
RESULT_VERSION = 5  # of a file's result; results of another version are not reused
READ_SECONDS = 3600.0  # the time limit for reading all bytes of a file
WRITE_EVERY = 1.0  # seconds; writing each result at once would take longer than reading headers


class CheckError(UserError):
    """A check cannot continue with its journal."""


@dataclass(frozen=True)
class ExamineOptions:
    """Choose how files are examined.

    Attributes:
        decode: ``headers``; ``sample``: also what training would read; ``full``: also every other
            packet.
        reader: reads a part as training does, and has the time limit for it.
        reader_name: of the reader in the journal; results of another one are not reused.
        workers: processes.
    """

    decode: Decode = "sample"
    reader: PartReader = PlainReader()
    reader_name: str = "plain"
    workers: int = 2


def gather(rows: Iterable[Line]) -> dict[str, tuple[Use, ...]]:
    """Collect every file of some rows, and the distinct ways in which they use it.

    Most files are used in one way, and most of those in the same way. So files with several uses
    are held apart, and equal uses share one tuple.
    """
    first_uses: dict[str, Use] = {}
    other_uses: dict[str, dict[Use, None]] = {}  # an ordered set, of files with several uses
    for line in rows:
        for path, use in media_of(line):
            if first_uses.setdefault(path, use) != use:
                other_uses.setdefault(path, {})[use] = None
    shared: dict[tuple[Use, ...], tuple[Use, ...]] = {}
    uses_by_path: dict[str, tuple[Use, ...]] = {}
    for path, first in first_uses.items():
        uses = (first, *other_uses.get(path, ()))
        uses_by_path[path] = shared.setdefault(uses, uses)
    return uses_by_path


def media_of(line: Line) -> list[tuple[str, Use]]:
    """Return file and use of each media part of a row; nothing for a malformed one."""
    if line.sample is None:
        return []
    return [(_absolute(part.path, line.manifest), Use.of(part)) for part in line.sample.media]


@functools.lru_cache(maxsize=1 << 12)
def _absolute(path: str, manifest: Path) -> str:
    file = resolve_path(path, manifest.parent)
    return url_of(file) or os.path.abspath(file)


class Files:
    """Hold the results of examined files.

    A result is the JSON-able dictionary of :func:`avllm.data.check.file.examine`. It is held as
    text, which takes a tenth of the memory of its objects.

    Attributes:
        options: how files are examined.
        journal: see below.
        reused: number of results that came from the journal.

    Args:
        options: how files are examined.
        journal: JSONL file that is read, and appended to; None writes none.
    """

    def __init__(self, options: ExamineOptions, journal: Path | None) -> None:
        self.options = options
        self.journal = journal
        self.reused = 0
        self._results: dict[str, str] = {}  # path -> JSON
        self._last_path = ""  # rows about one file are mostly neighbours: its result is parsed once
        self._last_result: dict[str, Any] = {}

    def __getitem__(self, path: str) -> dict[str, Any]:
        if path != self._last_path:
            self._last_result = json.loads(self._results[path])
            self._last_path = path
        return self._last_result

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        return ((path, json.loads(text)) for path, text in self._results.items())

    def __len__(self) -> int:
        return len(self._results)

    def examine(self, uses: Uses) -> None:
        """Examine each file that has no result in the journal, or has changed since.

        Raises:
            CheckError: the journal is damaged.
        """
        for entry in read_journal(self.journal):
            if entry.path in uses and entry.key == self._key(entry.path, uses[entry.path]):
                self._results[entry.path] = entry.result
        self.reused = len(self._results)
        keys: dict[str, str] = {}  # of the files in work, made before they are read
        results = run_guarded(
            partial(examine, self.options.reader, self.options.decode),
            self._jobs(uses, keys),
            workers=self.options.workers,
            seconds=self._time_limit,
        )
        remaining = len(uses) - self.reused
        with nullcontext() if self.journal is None else _Journal(self.journal) as journal:
            for job, result in _with_progress(results, "files", remaining):
                lost = isinstance(result, Lost)
                if lost:
                    result = result_without_decode(job, result.reason, result.detail)
                text = json.dumps(result, ensure_ascii=False)
                self._results[job.path] = text
                key = keys.pop(job.path)
                if journal is not None and not lost and not _may_pass(result):
                    journal.add(JournalEntry(job.path, key, text))

    def _jobs(self, uses: Uses, keys: dict[str, str]) -> Iterator[FileJob]:
        """Yield a job for each file without a result, and put its key into ``keys``."""
        for path in uses:
            if path not in self._results:
                keys[path] = self._key(path, uses[path])
                yield FileJob(path, uses[path])

    def _time_limit(self, job: FileJob) -> float:
        decodes = len(job.uses) + 1  # the headers beside the uses
        if self.options.decode == "full":
            decodes += 1
        return self.options.reader.timeout * decodes + OVERHEAD_SECONDS

    def _key(self, path: str, uses: Iterable[Use]) -> str:
        """Return a hash of all that a result depends on, so that a change makes it invalid.

        The time limit is left out: results that another limit could change are not journalled.
        """
        stamp = stamp_of(path)
        inputs = [
            RESULT_VERSION,
            stamp.size,
            stamp.changed,
            self.options.decode,
            self.options.reader_name,
            list(uses),
        ]
        return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:32]


class JournalEntry(NamedTuple):
    """Hold a file's path, the key of all that the result depends on, and the result."""

    path: str
    key: str
    result: str


def read_journal(journal: Path | None) -> Iterator[JournalEntry]:
    """Yield each whole line of a journal.

    Raises:
        CheckError: a line is damaged.
    """
    if journal is None:
        return
    advice = "delete the file, and all media are examined again"
    for row in read_whole_rows(journal, ("path", "key", "found"), CheckError, advice):
        yield JournalEntry(row["path"], row["key"], row["found"])


class _Journal:
    """Append entries to a journal about once a second, and when it is closed."""

    def __init__(self, path: Path) -> None:
        self._file = AppendOnly(path)
        self._unwritten: list[dict[str, Any]] = []
        self._written_at = time.monotonic()

    def add(self, entry: JournalEntry) -> None:
        """Add an entry."""
        self._unwritten.append({"path": entry.path, "key": entry.key, "found": entry.result})
        if time.monotonic() - self._written_at >= WRITE_EVERY:
            self._write()

    def _write(self) -> None:
        self._file.append(self._unwritten)
        self._unwritten = []
        self._written_at = time.monotonic()

    def __enter__(self) -> _Journal:
        return self

    def __exit__(self, *_: object) -> None:
        with self._file:
            self._write()


def _with_progress(results: Iterator[Any], name: str, total: int) -> Iterator[Any]:
    """Show a progress bar on stderr, unless there is nothing to do."""
    console = Console(stderr=True)
    yield from track(results, name, total=total, disable=total == 0, console=console)


def _may_pass(result: Mapping[str, Any]) -> bool:
    """Return whether a problem may be gone next time: a timeout, or a store without an answer."""
    problems = list(result["problems"])
    for use in result["uses"]:
        problems += use["problems"]
    return any(reason in ("timeout", "unreachable") for reason, _ in problems)


class Stamp(NamedTuple):
    """Hold size and time of change (ns) of a file, which reveal that it changed."""

    size: int
    changed: int


def stamp_of(path: str) -> Stamp:
    """Return the stamp of a file, with the time of its shard for a member and 0 for a URL.

    It is (-1, 0) for a file that cannot be reached; :func:`examine` reports why.
    """
    byte_range = byte_range_of(path)
    file = path if byte_range is None else byte_range.file
    try:
        size = size_of(path)
        if size is None:
            return Stamp(-1, 0)
        return Stamp(size, 0 if url_of(file) else os.stat(file).st_mtime_ns)
    except (StoreError, AccessError, FetchError, OutageError, OSError):
        return Stamp(-1, 0)


def same_bytes(paths: Iterable[str], workers: int, journal: Path | None) -> dict[str, str]:
    """Return the SHA-256 of the files whose size another one has; no others can be equal.

    Args:
        paths: of the files.
        workers: processes.
        journal: JSONL file of known hashes, which is appended to; None writes none.

    Raises:
        CheckError: the journal is damaged.
    """
    paths = list(paths)
    # Numbers in an array, since there may be millions of files.
    file_sizes = np.fromiter((stamp_of(path).size for path in paths), np.int64, len(paths))
    sizes, counts = np.unique(file_sizes, return_counts=True)
    repeated_sizes = sizes[(counts > 1) & (sizes > 0)]
    candidates = [paths[i] for i in np.flatnonzero(np.isin(file_sizes, repeated_sizes))]
    return remembered("duplicates", content_hash, candidates, workers, journal)


def remembered(
    name: str,
    function: Callable[[str], str | None],
    paths: Iterable[str],
    workers: int,
    journal: Path | None,
    seconds: float = READ_SECONDS,
) -> dict[str, str]:
    """Apply a function to files in worker processes, and remember its values in the journal.

    Args:
        name: of the values in the journal, where they are valid while a file's stamp is unchanged.
        function: takes a path; files for which it returns None are left out of the result.
        paths: of the files.
        workers: processes.
        journal: JSONL file; None writes none.
        seconds: time limit for a file.

    Returns:
        the value for each path, without those whose worker was lost.

    Raises:
        CheckError: the journal is damaged.
    """
    keys: dict[str, str] = {}
    for path in paths:
        stamp = stamp_of(path)
        keys[path] = f"{name} {stamp.size} {stamp.changed}"
    values: dict[str, str] = {}
    for entry in read_journal(journal):
        if keys.get(entry.path) == entry.key:
            values[entry.path] = entry.result
    missing = [path for path in keys if path not in values]
    results = run_guarded(function, missing, workers=workers, seconds=lambda path: seconds)
    with nullcontext() if journal is None or not missing else _Journal(journal) as open_journal:
        for path, value in _with_progress(results, name, len(missing)):
            if not isinstance(value, str):
                continue
            values[path] = value
            if open_journal is not None:
                open_journal.add(JournalEntry(path, keys[path], value))
    return values


def content_hash(path: str) -> str | None:
    """Return the SHA-256 of a file's bytes; None when it cannot be read."""
    try:
        return sha256(path)
    except (StoreError, AccessError, FetchError, OutageError, OSError):
        return None
