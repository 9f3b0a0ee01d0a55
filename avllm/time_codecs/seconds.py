"""Write times as numbers of seconds: ``1.5 s``, ``1.5 s to 3.0 s``. The default."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar

from avllm.time_codecs.base import Mention, Piece, TimeCodec
from avllm.times import say_moment

_NUMBER = r"(?<![\w.])(\d+(?:\.\d+)?)"
_UNIT = r"\s*(?:s|secs?|seconds?)\b"
# A start may leave its unit to the end: "from 1.5 to 3 seconds".
_MOMENT = re.compile(rf"{_NUMBER}(?:{_UNIT}|(?=\s*(?:to|-|–)\s*\d+(?:\.\d+)?{_UNIT}))")


class Seconds(TimeCodec):
    """Write plain seconds, which any LLM can read and say.

    TimeMarker (arXiv 2411.18211) writes times as text, too.

    Args:
        decimals: digits after the point.

    Raises:
        ValueError: fewer than 0.
    """

    needs_duration: ClassVar[bool] = False
    rewrites: ClassVar[bool] = False

    def __init__(self, *, decimals: int = 1) -> None:
        if decimals < 0:
            raise ValueError(f"seconds has decimals {decimals}; expected 0 or more")
        self.decimals = decimals

    def resolution(self, duration: float) -> float:
        """Return half of the last digit."""
        return 0.5 * 10**-self.decimals

    def moment(self, seconds: float, duration: float) -> Sequence[Piece]:
        return [say_moment(seconds, self.decimals)]

    def find(self, text: str, duration: float) -> list[Mention]:
        """Find ``1.5 s`` and its like: ``2 sec``, ``1.5 to 3 seconds``."""
        return [Mention(*match.span(), float(match[1])) for match in _MOMENT.finditer(text)]

    def to_seconds(self, text: str, duration: float) -> str:
        """Return the text, which says seconds already."""
        return text
