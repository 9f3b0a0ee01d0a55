"""An answers file that survives a kill: rows are appended in order, and a second run goes on behind the last one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from avllm.data.store.append_only import AppendOnly, LockedError, write_whole
from avllm.data.store.storage import sha256
from avllm.errors import UserError

CHECKPOINT_FILES = (
    "config.json",
    "manifest.json",
    "processor_config.json",
    "trained.safetensors",
    "chat_template.jinja",
)
CHECKPOINT_PATTERNS = ("tokenizer*", "lora/*/*")


class JournalError(UserError):
    """An answers file that belongs to another run, or that another process is writing."""


class Journal:
    """The answers file and, beside it, ``<name>.run.json``, which says what the answers belong to.

    Args:
        path: the answers file (JSONL).
        run: what decides the answers, JSON-able (digests of input and checkpoint, settings).

    Raises:
        JournalError: the file belongs to another run, to no known one, or is being written.
    """

    def __init__(self, path: str | Path, run: dict[str, Any]) -> None:
        self.path = Path(path)
        self.sidecar = self.path.with_name(self.path.name + ".run.json")
        with ExitStack() as on_error:
            try:
                self._rows = on_error.enter_context(AppendOnly(self.path))
            except LockedError as error:
                raise JournalError(str(error)) from error
            self._check(run)
            on_error.pop_all()

    @property
    def done(self) -> int:
        """Rows that are there."""
        return self._rows.count

    def errors(self) -> int:
        """Rows that are there and hold an error instead of an answer."""
        with self.path.open("rb") as file:
            return sum("error" in json.loads(line) for line in file)

    def _check(self, run: dict[str, Any]) -> None:
        if self.path.stat().st_size == 0:
            write_whole(self.sidecar, json.dumps(run, indent=2) + "\n")
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

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write rows, and come back when they are on the disk."""
        self._rows.append(rows)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._rows.close()


def checkpoint_digest(folder: str | Path) -> str:
    """SHA-256 over the files of a checkpoint that decide its answers (its manifest holds the backbones' hashes)."""
    folder = Path(folder)
    paths = {folder / name for name in CHECKPOINT_FILES} | {p for g in CHECKPOINT_PATTERNS for p in folder.glob(g)}
    total = hashlib.sha256()
    for path in sorted(p for p in paths if p.is_file()):
        total.update(f"{path.relative_to(folder)}:{sha256(path)}\n".encode())
    return total.hexdigest()
