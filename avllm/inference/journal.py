"""Append answers to a file that survives a kill: a second run continues after the last row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
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
    "tokenizer*",
    "lora/*/*",
)
"""Patterns of the files of a checkpoint that its answers depend on."""


class JournalError(UserError):
    """An answers file that belongs to another run, or that another process is writing."""


class Journal:
    """The answers file and, beside it, ``<name>.run.json``, which names the run of the answers.

    Args:
        path: the answers file (JSONL).
        run: all that answers depend on, JSON-able (digests of input and checkpoint, settings).

    Raises:
        JournalError: the file belongs to another run, lacks its ``.run.json``, or is being written.
    """

    def __init__(self, path: str | Path, run: dict[str, Any]) -> None:
        self.path = Path(path)
        self.sidecar = self.path.with_name(self.path.name + ".run.json")
        with ExitStack() as on_error:
            try:
                self._rows = on_error.enter_context(AppendOnly(self.path))
            except LockedError as error:
                raise JournalError(str(error), reason="locked") from error
            self._check(run)
            on_error.pop_all()

    @property
    def done(self) -> int:
        """Number of rows in the file."""
        return self._rows.count

    def errors(self) -> int:
        """Count the rows that hold an error instead of an answer."""
        with self.path.open("rb") as file:
            return sum("error" in json.loads(line) for line in file)

    def _check(self, run: dict[str, Any]) -> None:
        """Check that the file is empty, or holds answers of the same run."""
        if self.path.stat().st_size == 0:
            write_whole(self.sidecar, json.dumps(run, indent=2) + "\n")
            return
        if not self.sidecar.is_file():
            raise JournalError(
                f"{self.path} exists, but {self.sidecar.name}, which names the run of its answers, "
                "does not; choose another output, or delete the file to begin again",
                reason="no_run_file",
            )
        earlier = json.loads(self.sidecar.read_text(encoding="utf-8"))
        keys = sorted({*earlier, *run})
        differing = [key for key in keys if earlier.get(key) != run.get(key)]
        if differing:
            raise JournalError(
                f"{self.path} holds answers of another run: {', '.join(differing)} differ "
                f"({self.sidecar.name} has them); choose another output, or delete the file to "
                "begin again",
                reason="other_run",
            )

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write rows, and return when they are on the disk."""
        self._rows.append(rows)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        self._rows.close()


def checkpoint_digest(folder: str | Path) -> str:
    """Return a SHA-256 over the files of a checkpoint that its answers depend on.

    Backbones are covered by their hashes in the checkpoint's ``manifest.json``.
    """
    folder = Path(folder)
    paths: set[Path] = set()
    for pattern in CHECKPOINT_FILES:
        paths.update(path for path in folder.glob(pattern) if path.is_file())
    total = hashlib.sha256()
    for path in sorted(paths):
        total.update(f"{path.relative_to(folder)}:{sha256(path)}\n".encode())
    return total.hexdigest()
