"""All files of some manifests, looked at in parallel; a journal keeps what was found, so that a check goes on."""

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
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from avllm.data.check.file import Decode, Job, PlainReader, Reader, Use, examine, nothing_but
from avllm.data.check.rows import Line
from avllm.data.check.workers import Lost, run_guarded
from avllm.data.schema import resolve_path
from avllm.data.store.append_only import AppendOnly, read_whole_rows
from avllm.data.store.storage import StoreError, byte_range_of, sha256, size_of, url_of
from avllm.errors import UserError

Uses = Mapping[str, tuple[Use, ...]]
OVERHEAD_SECONDS = 10.0  # that a file may take beside decoding: reading it over a network, a busy machine
FORM = 4  # of what is found out about a file; results of another form are not reused
LONGEST_SECONDS = 3600.0  # for reading all bytes of a file
KEEP_EVERY = 1.0  # seconds; a journal that comes to the disk file by file is slower than reading headers


class CheckError(UserError):
    """A check cannot go on out of its journal."""


@dataclass(frozen=True)
class Looking:
    """How files are looked at.

    Attributes:
        decode: ``headers``; ``sample``: also what training would read; ``full``: also every other packet.
        reader: reads a part as training does, and knows how many seconds that may take.
        reading: names the reader in the journal: results of another one are not reused.
        workers: processes.
    """

    decode: Decode = "sample"
    reader: Reader = PlainReader()
    reading: str = "plain"
    workers: int = 2


def gather(rows: Iterable[Line]) -> dict[str, tuple[Use, ...]]:
    """Every file of some rows, and the distinct ways in which they use it."""
    first: dict[str, Use] = {}
    more: dict[str, dict[Use, None]] = {}  # of the few files that are used in several ways
    for line in rows:
        for path, use in media_of(line):
            if first.setdefault(path, use) != use:
                more.setdefault(path, {})[use] = None
    shared: dict[tuple[Use, ...], tuple[Use, ...]] = {}  # most files are used alike: one tuple for all of them
    return {path: shared.setdefault(uses, uses) for path, use in first.items() if (uses := (use, *more.get(path, ())))}


def media_of(line: Line) -> list[tuple[str, Use]]:
    """The file and the use of each media part of a row; none of a malformed one."""
    parts = [] if line.sample is None else line.sample.media
    return [(_absolute(part.path, line.manifest), Use.of(part)) for part in parts]


@functools.lru_cache(maxsize=1 << 12)
def _absolute(path: str, manifest: Path) -> str:
    found = resolve_path(path, manifest.parent)
    return url_of(found) or os.path.abspath(found)


class Files:
    """What was found out about files.

    Attributes:
        reused: how many came out of the journal.

    Args:
        looking: how they are looked at.
        journal: JSONL file that is read, and written on; None keeps nothing.
    """

    def __init__(self, looking: Looking, journal: Path | None) -> None:
        self.looking, self.journal, self.reused = looking, journal, 0
        self._known: dict[str, str] = {}  # path -> its result as JSON: a tenth of the memory of its objects
        self._last: tuple[str, dict[str, Any]] = ("", {})  # rows about one file mostly stand together

    def __getitem__(self, path: str) -> dict[str, Any]:
        if path != self._last[0]:
            self._last = path, json.loads(self._known[path])
        return self._last[1]

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        return ((path, json.loads(text)) for path, text in self._known.items())

    def __len__(self) -> int:
        return len(self._known)

    def look(self, uses: Uses) -> None:
        """Look at each file that the journal does not know as it is now.

        Raises:
            CheckError: the journal is damaged.
        """
        for path, key, text in journalled(self.journal):
            if path in uses and key == self._key(path, uses[path]):
                self._known[path] = text
        self.reused = len(self._known)
        keys: dict[str, str] = {}  # of the files in work: how they were before they were looked at
        look = partial(examine, self.looking.reader, self.looking.decode)
        done = run_guarded(look, self._jobs(uses, keys), workers=self.looking.workers, seconds=self._seconds)
        todo = len(uses) - self.reused
        shown = track(done, "files", total=todo, disable=todo == 0, console=Console(stderr=True))
        with nullcontext() if self.journal is None else _Journal(self.journal) as journal:
            for job, found in shown:
                key = keys.pop(job.path)
                result = nothing_but(job, found.reason, found.detail) if isinstance(found, Lost) else found
                self._known[job.path] = json.dumps(result, ensure_ascii=False)
                if journal is not None and not isinstance(found, Lost) and not _passing(found):
                    journal.add({"path": job.path, "key": key, "found": self._known[job.path]})

    def _jobs(self, uses: Uses, keys: dict[str, str]) -> Iterator[Job]:
        for path in uses:
            if path not in self._known:
                keys[path] = self._key(path, uses[path])
                yield Job(path, uses[path])

    def _seconds(self, job: Job) -> float:
        decodes = len(job.uses) + 1 + (self.looking.decode == "full")  # the headers beside the uses
        return self.looking.reader.timeout * decodes + OVERHEAD_SECONDS

    def _key(self, path: str, uses: Iterable[Use]) -> str:
        size, changed = stamp(path)
        # not the time limit: what another one would change is not kept
        how = [FORM, size, changed, self.looking.decode, self.looking.reading, list(uses)]
        return hashlib.sha256(json.dumps(how).encode()).hexdigest()[:32]


def journalled(journal: Path | None) -> Iterator[tuple[str, str, str]]:
    """(path, key, result) of each whole line.

    Raises:
        CheckError: a line is no entry.
    """
    if journal is None:
        return
    advice = "delete the file, and all media are examined again"
    for row in read_whole_rows(journal, ("path", "key", "found"), CheckError, advice):
        yield row["path"], row["key"], row["found"]


class _Journal:
    """A journal that is brought to the disk now and then, and when it is closed."""

    def __init__(self, path: Path) -> None:
        self._file = AppendOnly(path)
        self._waiting: list[dict[str, Any]] = []
        self._kept = time.monotonic()

    def add(self, row: dict[str, Any]) -> None:
        """Take in a row."""
        self._waiting.append(row)
        if time.monotonic() - self._kept >= KEEP_EVERY:
            self._keep()

    def _keep(self) -> None:
        self._file.append(self._waiting)
        self._waiting, self._kept = [], time.monotonic()

    def __enter__(self) -> _Journal:
        return self

    def __exit__(self, *_: object) -> None:
        with self._file:
            self._keep()


def _passing(found: Mapping[str, Any]) -> bool:
    """Whether time ran out over a file, or its store did not answer: another day they may do better."""
    problems = [*found["problems"], *(p for use in found["uses"] for p in use["problems"])]
    return any(reason in ("timeout", "unreachable") for reason, _ in problems)


def stamp(path: str) -> tuple[int, int]:
    """Size and time of change of a file (of its shard; 0 behind a URL); (-1, 0) of one that cannot be reached."""
    place = byte_range_of(path)
    file = path if place is None else place.file
    try:
        size = size_of(path)
        changed = 0 if size is None or url_of(file) else os.stat(file).st_mtime_ns
    except (StoreError, OSError):  # gone between two looks, or in a store that does not answer: examine() tells
        size = None
    return (-1, 0) if size is None else (size, changed)


def same_bytes(paths: Iterable[str], workers: int, journal: Path | None) -> dict[str, str]:
    """SHA-256 of the files that can have a twin at all: those whose size another one has.

    Args:
        workers: processes. journal: JSONL file of hashes that are known, which is added to; None keeps nothing.

    Raises:
        CheckError: the journal is damaged.
    """
    paths = list(paths)
    sizes = np.fromiter((stamp(path)[0] for path in paths), np.int64, len(paths))
    found, counts = np.unique(sizes, return_counts=True)
    twins = np.isin(sizes, found[(counts > 1) & (found > 0)])
    wanted = [paths[i] for i in np.flatnonzero(twins)]
    return remembered("duplicates", content_hash, wanted, workers, journal)


def remembered(
    name: str,
    function: Callable[[str], str | None],
    paths: Iterable[str],
    workers: int,
    journal: Path | None,
    seconds: float = LONGEST_SECONDS,
) -> dict[str, str]:
    """What a function says of files, in worker processes; None, and what a lost worker would have said, is left out.

    Args:
        name: of what it says, in the journal, where it stands as long as a file's size and time are the same.
        seconds: a file may take.

    Raises:
        CheckError: the journal is damaged.
    """
    keys = {path: "{} {} {}".format(name, *stamp(path)) for path in paths}
    known = {path: text for path, key, text in journalled(journal) if keys.get(path) == key}
    todo = [path for path in keys if path not in known]
    done = run_guarded(function, todo, workers=workers, seconds=lambda path: seconds)
    shown = track(done, name, total=len(todo), disable=not todo, console=Console(stderr=True))
    with nullcontext() if journal is None or not todo else _Journal(journal) as kept:
        for path, found in shown:
            if isinstance(found, str):
                known[path] = found
                if kept is not None:
                    kept.add({"path": path, "key": keys[path], "found": found})
    return known


def content_hash(path: str) -> str | None:
    """SHA-256 of a file's bytes; None when it cannot be read."""
    try:
        return sha256(path)
    except (StoreError, OSError):
        return None
