"""Append rows to a JSONL file so that a killed process leaves only whole rows.

A row counts when its line ends. A line that a kill cut short is passed over by readers and cut by
the next writer. One process writes at a time.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any

from avllm.data.store.storage import local_path
from avllm.errors import UserError, writing


class LockedError(UserError):
    """Another process is writing the file."""


def read_whole_rows(
    path: Path,
    fields: Collection[str],
    error_type: type[UserError],
    advice: str,
) -> Iterator[dict[str, Any]]:
    """Yield each row of a file whose line is complete; yield none when there is no file.

    Args:
        path: JSONL file.
        fields: each row must have them.
        error_type: is raised for a row that is no JSON object with these fields.
        advice: ends its message: what the user should do.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                continue
            try:
                row = json.loads(line)
                missing = set(fields) - row.keys()
            except (ValueError, AttributeError) as error:
                message = f"{path} line {number} is damaged ({error!r}); {advice}"
                raise error_type(message, reason="damaged_row") from error
            if missing:
                message = f"{path} line {number} lacks {sorted(missing)}; {advice}"
                raise error_type(message, reason="damaged_row")
            yield row


class AppendOnly:
    """Open a JSONL file to append rows after its last whole row.

    Attributes:
        path: the file.
        count: whole rows in it.

    Raises:
        LockedError: another process has it open in the same way. StoreError: it is a URL.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = local_path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as on_error:
            self._file = on_error.enter_context(self.path.open("ab+"))
            lock(self._file, self.path)
            self.count = 0
            self._whole_size = 0  # bytes up to the end of the last whole row
            self._measure()
            on_error.pop_all()

    def _measure(self) -> None:
        """Count whole rows and their bytes; a torn line is cut only when something is appended."""
        self._file.seek(0)
        for line in self._file:
            if line.endswith(b"\n"):
                self.count += 1
                self._whole_size += len(line)

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write rows and return when they are on the disk.

        Raises:
            WriteError: they cannot be written; the rows before stay.
        """
        lines = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
        with writing(self.path):
            self._file.truncate(self._whole_size)
            self._file.write(lines)
            self._file.flush()
            os.fsync(self._file.fileno())
        self.count += len(rows)
        self._whole_size += len(lines)

    def close(self) -> None:
        """Close the file and release the lock."""
        with suppress(OSError):  # rows that `append` could not write
            self._file.close()

    def __enter__(self) -> AppendOnly:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def lock(file: IO[Any], path: Path) -> None:
    """Lock an open file against other writers until it is closed.

    Raises:
        LockedError: another process holds the lock.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the process dies
    except BlockingIOError as error:
        raise LockedError(
            f"{path} is being written by another process; wait until it ends, or stop it",
            reason="locked",
        ) from error


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all, and return when it is on the disk.

    Raises:
        WriteError: it cannot be written; what was there before is unchanged.
    """
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync(path.parent)


def sync(path: Path) -> None:
    """Return when a file, or the names of a folder's files, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
