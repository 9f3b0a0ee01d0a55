"""A JSONL file that survives a kill: rows are appended whole, a half-written last one is cut, one process writes."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from avllm.data.store.storage import here
from avllm.errors import UserError


class LockedError(UserError):
    """Another process is writing the file."""


def whole_rows(path: Path, keys: tuple[str, ...], refusal: type[Exception], problem: str) -> Iterator[tuple[Any, ...]]:
    """The values of ``keys`` in each whole row of a file that may not be there; one that was cut short is passed over.

    Raises:
        refusal: a row is no JSON or lacks a key; ``problem`` says what it should be, with ``{error!r}``.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                continue
            try:
                row = json.loads(line)
                found = tuple(row[key] for key in keys)
            except (ValueError, KeyError, TypeError) as error:
                raise refusal(f"{path} line {number} {problem.format(error=error)}") from error
            yield found


class AppendOnly:
    """Open a JSONL file to go on behind its last whole row.

    Attributes:
        path: the file.
        count: whole rows in it.

    Raises:
        LockedError: another process has it open in the same way. StoreError: it is a URL.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = here(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as on_error:
            self._file = on_error.enter_context(self.path.open("ab+"))
            lock(self._file, self.path)
            self.count, self._whole = self._measure()
            on_error.pop_all()

    def _measure(self) -> tuple[int, int]:
        """Whole rows, and the bytes that they take; nothing is cut before something is appended."""
        self._file.seek(0)
        count, size = 0, 0
        for line in self._file:
            if line.endswith(b"\n"):
                count, size = count + 1, size + len(line)
        return count, size

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write rows, and come back when they are on the disk."""
        lines = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
        self._file.truncate(self._whole)
        self._file.write(lines)
        self._file.flush()
        os.fsync(self._file.fileno())
        self.count, self._whole = self.count + len(rows), self._whole + len(lines)

    def close(self) -> None:
        """Close the file and give back the lock."""
        self._file.close()

    def __enter__(self) -> AppendOnly:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def lock(file: IO[Any], path: Path) -> None:
    """Keep others from writing an open file until it is closed.

    Raises:
        LockedError: somebody else has it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel gives it back when the process dies
    except BlockingIOError as error:
        raise LockedError(f"{path} is being written by another process; let it end, or stop it") from error


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all, and come back when it is on the disk."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
