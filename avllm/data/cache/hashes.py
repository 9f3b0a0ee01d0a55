"""Keep the hashes of media files beside a feature cache; unchanged files are not read again."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rich.progress import track

from avllm.data.cache.disk import CacheError
from avllm.data.store.append_only import read_whole_rows
from avllm.data.store.storage import byte_range_of, sha256, size_of, url_of
from avllm.log import logger

LOG = logger(__name__)
NAME = "hashes.jsonl"
FIELDS = ("path", "state", "sha256")
FILES_AT_ONCE = 256  # files that are handed to the threads at a time
WRITE_EVERY = 1.0  # seconds between writes: the work that a kill costs
LONGEST_LINE = 2**20  # bytes, more than any line takes


@dataclass(frozen=True)
class _File:
    """A file by its full name, with the state that says whether it changed."""

    name: str
    path: Path
    state: list[int] | None


class Hashes:
    """Hold the SHA-256 of files by path.

    A hash is read from ``hashes.jsonl`` where the file's size and times are unchanged, and computed
    from its bytes otherwise. Any number of processes may read and add; each waits for its turn to
    write. Files in a store are read each time: not every store reports when a file changed.

    Args:
        folder: of the cache.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / NAME
        self._hashes: dict[str, str] = {}

    def __getitem__(self, path: Path) -> str:
        """Return the hash of a file that was added."""
        return self._hashes[_full_name(path)]

    def add(self, paths: Iterable[Path], threads: int = 1, progress_bar: bool = True) -> int:
        """Add files; hash those without a valid entry in ``hashes.jsonl``.

        Args:
            paths: of the files.
            threads: that read.
            progress_bar: show one.

        Returns:
            how many files were hashed.

        Raises:
            CacheError: a line of ``hashes.jsonl`` is damaged. OSError: a file cannot be read.
        """
        files = {name: _File(name, path, state_of(path)) for name, path in _by_name(paths).items()}
        self._read_entries(files)
        missing = [file for name, file in files.items() if name not in self._hashes]
        entries: list[dict[str, object]] = []
        written = time.monotonic()
        with ThreadPoolExecutor(max(1, threads)) as pool:
            hashed = track(
                self._hash(pool, missing),
                "hashing files",
                total=len(missing),
                disable=not (progress_bar and missing),
            )
            for file, digest in hashed:
                self._hashes[file.name] = digest
                if file.state is not None:
                    entries.append({"path": file.name, "state": file.state, "sha256": digest})
                if time.monotonic() - written >= WRITE_EVERY:
                    self._write(entries)
                    entries = []
                    written = time.monotonic()
        self._write(entries)
        return len(missing)

    def _read_entries(self, files: dict[str, _File]) -> None:
        """Take the hashes of unchanged files from ``hashes.jsonl``."""
        advice = "delete the file, and the hashes are made again"
        for entry in read_whole_rows(self.file, FIELDS, CacheError, advice):
            file = files.get(entry["path"])
            if file is not None and file.state == entry["state"]:
                self._hashes[file.name] = entry["sha256"]

    @staticmethod
    def _hash(pool: ThreadPoolExecutor, files: list[_File]) -> Iterator[tuple[_File, str]]:
        """Yield each file with its hash; a million tasks at once would take a gigabyte."""
        for first in range(0, len(files), FILES_AT_ONCE):
            some = files[first : first + FILES_AT_ONCE]
            digests = pool.map(file_hash, [file.path for file in some])
            yield from zip(some, digests, strict=True)

    def _write(self, entries: list[dict[str, object]]) -> None:
        """Append entries; a folder that cannot be written to costs a warning only."""
        if not entries:
            return
        lines = b"".join(json.dumps(entry).encode() + b"\n" for entry in entries)
        try:
            with self.file.open("ab+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed
                _cut_torn_line(file)
                file.write(lines)
        except OSError as error:
            LOG.warning(
                "%s cannot be written (%s): %d files will be hashed again",
                self.file,
                error,
                len(entries),
            )


def _cut_torn_line(file: IO[bytes]) -> None:
    """Cut a last line that a process which died did not finish."""
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - LONGEST_LINE))
    tail = file.read()
    whole = tail.rfind(b"\n") + 1
    if whole < len(tail):
        file.truncate(end - (len(tail) - whole))


def _full_name(path: Path) -> str:
    return url_of(path) or os.path.abspath(path)


def _by_name(paths: Iterable[Path]) -> dict[str, Path]:
    return {_full_name(path): path for path in paths}


def state_of(path: Path) -> list[int] | None:
    """Return size and times of a file (of its shard); None where they do not reveal a change.

    The time of change (ctime) is read beside that of modification (mtime): a copy that keeps times
    sets mtime back and not ctime.
    """
    byte_range = byte_range_of(path)
    file = str(path) if byte_range is None else byte_range.file
    if url_of(file) or not os.path.isfile(file):
        return None
    status = os.stat(file)
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file's bytes; of a missing file a mark, since decoding reports it."""
    return f"absent: {path}" if size_of(path) is None else sha256(path)
