"""Write times as hundredths of the clip, in two digits."""

from __future__ import annotations

import re
from collections.abc import Sequence

from avllm.time_codecs.base import Mention, Piece, TimeCodec


class Percent(TimeCodec):
    """Write ``00`` to ``99`` of the clip's duration (AVicuna, arXiv 2403.16276).

    VTimeLLM (arXiv 2311.18445) writes the same numbers.
    The LLM need not know how long a clip is, and clips of any length share a hundred numbers. The
    last hundredth means the end, too.

    Args:
        mark: written after the digits, so that they differ from other numbers; AVicuna writes none
            (``""``).
    """

    def __init__(self, *, mark: str = "%") -> None:
        self.mark = mark
        end = re.escape(mark) if mark else r"(?![\d%]|\.\d)"
        self._moment = re.compile(rf"(?<![\d.])(\d\d){end}")

    def resolution(self, duration: float) -> float:
        """Return a hundredth of the clip, the error at its end; it is half of that elsewhere."""
        return duration / 100

    def moment(self, seconds: float, duration: float) -> Sequence[Piece]:
        share = seconds / duration if duration > 0 else 0.0
        hundredths = min(99, round(100 * share))
        return [f"{hundredths:02d}{self.mark}"]

    def find(self, text: str, duration: float) -> list[Mention]:
        matches = self._moment.finditer(text)
        return [Mention(*match.span(), int(match[1]) / 100 * duration) for match in matches]
