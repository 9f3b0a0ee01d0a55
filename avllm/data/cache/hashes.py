"""Hashes of media files, kept beside a feature cache: a file that is as it was is not read again to be found."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

from rich.progress import track

from avllm.data.cache.disk import CacheError
from avllm.data.store.append_only import read_whole_rows
from avllm.data.store.storage import byte_range_of, sha256, size_of, url_of
from avllm.log import logger

LOG = logger(__name__)
NAME = "hashes.jsonl"
AT_ONCE = 256  # files that threads are given at a time
KEEP_EVERY = 1.0  # seconds between writings: what a kill costs
TAIL = 2**20  # bytes, more than any line takes


class Hashes:
    """SHA-256 by file, out of ``hashes.jsonl`` where size and times are as they were, and else of the bytes.

    Any number of processes may read and add; each waits for its turn to write. What lies in a store is read each time:
    not all of them tell when a file changed.

    Args:
        folder: of the cache.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / NAME
        self._known: dict[str, str] = {}

    def __getitem__(self, path: Path) -> str:
        """The hash of a file that was looked at."""
        return self._known[_name(path)]

    def look(self, paths: Iterable[Path], threads: int = 1, bar: bool = True) -> int:
        """Take in files; those that are not known are hashed, with a progress bar.

        Args:
            threads: that read. bar: show it.

        Returns:
            how many were hashed.

        Raises:
            CacheError: a line of ``hashes.jsonl`` is damaged. OSError: a file cannot be read.
        """
        wanted = {name: (path, state_of(path)) for name, path in {_name(p): p for p in paths}.items()}
        for name, state, found in self._kept():
            if name in wanted and wanted[name][1] == state:
                self._known[name] = found
        todo = [name for name in wanted if name not in self._known]
        added: list[dict[str, object]] = []
        written = time.monotonic()
        with ThreadPoolExecutor(max(1, threads)) as pool:
            done = self._hash(pool, [(name, wanted[name][0]) for name in todo])
            for name, found in track(done, "hashing files", total=len(todo), disable=not (bar and todo)):
                self._known[name] = found
                if wanted[name][1] is not None:
                    added.append({"path": name, "state": wanted[name][1], "sha256": found})
                if time.monotonic() - written >= KEEP_EVERY:
                    self._keep(added)
                    added, written = [], time.monotonic()
        self._keep(added)
        return len(todo)

    @staticmethod
    def _hash(pool: ThreadPoolExecutor, files: list[tuple[str, Path]]) -> Iterator[tuple[str, str]]:
        for first in range(0, len(files), AT_ONCE):  # handing over a million at once would take a gigabyte
            some = files[first : first + AT_ONCE]
            yield from zip((name for name, _ in some), pool.map(file_hash, [p for _, p in some]), strict=True)

    def _kept(self) -> Iterator[tuple[str, list[int], str]]:
        """(file, state, hash) of each whole line."""
        advice = "delete the file, and the hashes are made again"
        for row in read_whole_rows(self.file, ("path", "state", "sha256"), CacheError, advice):
            yield row["path"], row["state"], row["sha256"]

    def _keep(self, rows: list[dict[str, object]]) -> None:
        if not rows:
            return
        lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
        try:
            with self.file.open("ab+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # for as long as the file is open
                _cut_torn_line(file)
                file.write(lines)
        except OSError as error:
            LOG.warning("%s cannot be written (%s): %d files will be hashed again", self.file, error, len(rows))


def _cut_torn_line(file: IO[bytes]) -> None:
    """Cut what a process that died left of its last line."""
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - TAIL))
    tail = file.read()
    whole = tail.rfind(b"\n") + 1
    if whole < len(tail):
        file.truncate(end - (len(tail) - whole))


def _name(path: Path) -> str:
    return url_of(path) or os.path.abspath(path)


def state_of(path: Path) -> list[int] | None:
    """Size and times of a file (of its shard); None where they do not tell whether it changed.

    The time of change (ctime) beside that of modification: copying with times kept sets the one and not the other.
    """
    place = byte_range_of(path)
    file = str(path) if place is None else place.file
    if url_of(file) or not os.path.isfile(file):
        return None
    found = os.stat(file)
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, or its absence: the decoder will say what is wrong."""
    return f"absent: {path}" if size_of(path) is None else sha256(path)
