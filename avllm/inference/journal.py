"""Append answers to a file that survives a kill: a second run continues after the last row.

Each answer names its request by a digest, so that the second run finds out whether the requests
are still those that were answered.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from avllm.data.store.append_only import AppendOnly, LockedError, read_whole_rows, write_whole
from avllm.data.store.storage import local_path, sha256
from avllm.errors import UserError, one_line
from avllm.inference.request_file import RequestLine
from avllm.models.checkpoint_format import MANIFEST
from avllm.models.loading.digests import ALL_FILES, files_of

ADVICE = "choose another output, or delete the file to begin again"


class JournalError(UserError):
    """An answers file that belongs to another run, or that another process is writing.

    Reasons: ``locked``, ``no_run_file``, ``other_run``, ``other_requests``, ``damaged_row``.
    """


class Journal:
    """The answers file and, beside it, ``<name>.run.json``, which names the run of the answers.

    A file that was not there before is removed if nothing was appended to it.

    Args:
        path: the answers file (JSONL).
        run: all that answers depend on beside their requests, JSON-able.
        requests: the rows to answer, in the order of the answers.

    Raises:
        JournalError: the file belongs to another run or to other requests, lacks its ``.run.json``,
            or is being written. Nothing of it was changed.
    """

    def __init__(
        self, path: str | Path, run: dict[str, Any], requests: Sequence[RequestLine]
    ) -> None:
        self.path = local_path(path)
        self.sidecar = self.path.with_name(self.path.name + ".run.json")
        self.requests = requests
        self._is_new = not self.path.exists()
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
        return sum("error" in row for row in read_whole_rows(self.path, (), JournalError, ADVICE))

    def _check(self, run: dict[str, Any]) -> None:
        """Check that the file is empty, or holds answers of the same run to the same requests."""
        if self.path.stat().st_size == 0:
            write_whole(self.sidecar, json.dumps(run, indent=2) + "\n")
            return
        if not self.sidecar.is_file():
            raise JournalError(
                f"{self.path} exists, but {self.sidecar.name}, which names the run of its answers, "
                f"does not; {ADVICE}",
                reason="no_run_file",
            )
        try:
            earlier = json.loads(self.sidecar.read_text(encoding="utf-8"))
            differing = differences(dict(earlier), run)
        except (ValueError, TypeError) as error:
            raise JournalError(
                f"{self.sidecar} is damaged ({one_line(error)}); {ADVICE}", reason="no_run_file"
            ) from error
        if differing:
            raise JournalError(
                f"{self.path} holds answers of another run: {'; '.join(differing)}. "
                f"Run with those of {self.sidecar.name}; or {ADVICE}",
                reason="other_run",
            )
        self._check_rows()

    def _check_rows(self) -> None:
        """Check that each answer is that of the request in its place."""
        rows = read_whole_rows(self.path, ("id", "request"), JournalError, ADVICE)
        for place, row in enumerate(rows):
            expected = self.requests[place] if place < len(self.requests) else None
            if expected is None or row["request"] != expected.digest or row["id"] != expected.id:
                raise JournalError(
                    f"{self.path} line {place + 1} answers row {row['id']!r}, but "
                    f"{self._seen(row, expected)}. A line of one of the two files was changed, "
                    f"removed or moved since: put it back (new rows go at the end), or {ADVICE}",
                    reason="other_requests",
                )

    def _seen(self, row: dict[str, Any], expected: RequestLine | None) -> str:
        """Say what is in the place of an answer's request now, and where the request went."""
        if expected is None:
            return f"there are only {len(self.requests)} requests"
        if row["id"] == expected.id:
            return f"{expected.where} asks otherwise than when it was answered"
        seen = f"{expected.where} in its place is row {expected.id!r}"
        for request in self.requests:
            if request.digest == row["request"]:
                return f"{seen}, and {row['id']!r} is {request.where}"
        return seen

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write the answers to the next requests, and return when they are on the disk."""
        lines = []
        for place, row in enumerate(rows, start=self.done):
            lines.append({**row, "request": self.requests[place].digest})
        self._rows.append(lines)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._is_new and self.path.stat().st_size == 0:
            self.path.unlink()
            self.sidecar.unlink()
        self._rows.close()


def differences(earlier: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return each setting that differs, with both values; those of sections as ``section.key``."""
    earlier = _flat(earlier)
    now = _flat(now)
    keys = [key for key in sorted({*earlier, *now}) if earlier.get(key) != now.get(key)]
    return [f"{key} is {_short(now.get(key))}, was {_short(earlier.get(key))}" for key in keys]


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": inner for key, inner in _flat(value).items()}
        else:
            flat[name] = value
    return flat


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 20 else text[:12] + "..."


def checkpoint_digest(folder: str | Path) -> str:
    """Return a SHA-256 over the files of a checkpoint that its answers depend on.

    Backbones are covered by their hashes in the checkpoint's ``manifest.json``.
    """
    folder = Path(folder)
    total = hashlib.sha256()
    for name in files_of(folder, (*ALL_FILES, MANIFEST)):
        total.update(f"{name}:{sha256(folder / name)}\n".encode())
    return total.hexdigest()
