"""Name what is wrong with a media file, and limit the time of reading it."""

from __future__ import annotations

import struct
import time
import zlib
from pathlib import Path

from avllm.errors import UserError

REASONS = (
    "missing",
    "zero_byte",
    "undecodable",
    "absurd_header",
    "truncated",
    "bad_values",
    "no_video",
    "no_audio",
    "timeout",
    "empty_interval",
    "forbidden",
    "too_large",
    "unreachable",
)

# Raised by Pillow over damaged bytes, beside DecompressionBombError.
BROKEN_PICTURE = (
    OSError,
    SyntaxError,
    EOFError,
    ValueError,
    RuntimeError,
    ArithmeticError,
    LookupError,
    struct.error,
    zlib.error,
)


class MediaError(UserError):
    """A media file cannot be used.

    Attributes:
        path: the file.
        reason: one of ``REASONS``; counted by the loader and by ``avllm data check``.
        detail: what was seen, for a person.
    """

    def __init__(self, path: str | Path, reason: str, detail: str) -> None:
        if reason not in REASONS:
            raise ValueError(f"unknown reason {reason!r}; expected one of {', '.join(REASONS)}")
        super().__init__(str(path), reason, detail)  # all in args, for pickle
        self.path = str(path)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}: {self.detail}"


class Deadline:
    """Limit the wall-clock time of one load; ``check`` is called between packets."""

    def __init__(self, path: str | Path, seconds: float) -> None:
        self.path = path
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def check(self) -> None:
        """Raise ``MediaError`` (timeout) when the time is over."""
        if time.monotonic() > self._end:
            raise MediaError(self.path, "timeout", f"decoding took more than {self.seconds:g} s")
