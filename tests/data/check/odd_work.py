"""Define work that makes worker processes hang or die; they import it from this module."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from avllm.data.check.uses import PlainReader
from avllm.data.media.load import Clip, MediaError
from avllm.data.schema import MediaPart


def square(number: int) -> int:
    """Return the square; 3 kills its process as a bug in a decoder does, 4 hangs, 5 raises."""
    if number == 3:
        os.kill(os.getpid(), signal.SIGSEGV)
    if number == 4:
        time.sleep(60)
    if number == 5:
        raise ArithmeticError("five")
    return number * number


@dataclass(frozen=True)
class OddReader(PlainReader):
    """Read as usual, but hang, die or be late over files with such names."""

    timeout: float = 0.2

    def load_clips(self, parts: Sequence[MediaPart], root: Path | None) -> list[Clip]:
        """Decode a media part, hang, die, or be late."""
        (part,) = parts
        if "hangs" in part.path:
            time.sleep(60)
        if "kills" in part.path:
            os.kill(os.getpid(), signal.SIGSEGV)
        if "late" in part.path:
            raise MediaError(part.path, "timeout", "the machine is busy")
        return super().load_clips(parts, root)
