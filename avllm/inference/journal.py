"""An answers file that survives a kill: rows are appended in order, and a second run goes on behind the last one."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

CHECKPOINT_FILES = (
    "config.json",
    "manifest.json",
    "avllm_processor.json",
    "trained.safetensors",
    "chat_template.jinja",
)
CHECKPOINT_PATTERNS = ("tokenizer*", "lora/*")


class JournalError(ValueError):
    """An answers file that belongs to another run, or that another process is writing."""


class Journal:
    """The answers file and, beside it, ``<name>.run.json``, which says what the answers belong to.

    Args:
        path: the answers file (JSONL).
        run: what decides the answers, JSON-able (digests of input and checkpoint, settings).

    Attributes:
        done: rows that are there.

    Raises:
        JournalError: the file belongs to another run, to no known one, or is being written.
    """

    def __init__(self, path: str | Path, run: dict[str, Any]) -> None:
        self.path = Path(path)
        self.sidecar = self.path.with_name(self.path.name + ".run.json")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab+")
        try:
            self._lock()
            self._check(run)
            self.done = self._cut()
        except BaseException:
            self._file.close()
            raise

    def _check(self, run: dict[str, Any]) -> None:
        if self.path.stat().st_size == 0:
            _write_whole(self.sidecar, json.dumps(run, indent=2) + "\n")
            return
        if not self.sidecar.is_file():
            raise JournalError(
                f"{self.path} exists, but {self.sidecar.name}, which says what it belongs to, does not; "
                "choose another output, or delete the file to begin again"
            )
        known = json.loads(self.sidecar.read_text(encoding="utf-8"))
        other = sorted(k for k in {*known, *run} if known.get(k) != run.get(k))
        if other:
            raise JournalError(
                f"{self.path} holds answers of another run: {', '.join(other)} differ "
                f"({self.sidecar.name} has them); choose another output, or delete the file to begin again"
            )

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel gives it back when the process dies
        except BlockingIOError as error:
            raise JournalError(f"{self.path} is being written by another process; let it end, or stop it") from error

    def _cut(self) -> int:
        """Take off a half-written last line; returns how many whole ones there are."""
        self._file.seek(0)
        whole, count = 0, 0
        for line in self._file:
            if line.endswith(b"\n"):
                whole, count = whole + len(line), count + 1
        self._file.truncate(whole)
        return count

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write rows, and come back when they are on the disk."""
        self._file.write(b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done += len(rows)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def checkpoint_digest(folder: str | Path) -> str:
    """SHA-256 over the files of a checkpoint that decide its answers (its manifest holds the backbones' hashes)."""
    folder = Path(folder)
    paths = {folder / name for name in CHECKPOINT_FILES} | {p for g in CHECKPOINT_PATTERNS for p in folder.glob(g)}
    total = hashlib.sha256()
    for path in sorted(p for p in paths if p.is_file()):
        with path.open("rb") as file:
            total.update(f"{path.relative_to(folder)}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()
