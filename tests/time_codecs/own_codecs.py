"""A codec of clip hundredths as words that no LLM has; between two, a mixture of both."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from avllm.time_codecs.base import Mention, Mixture, Piece, TimeCodec


class Anchors(TimeCodec):
    """``<t0>`` to ``<t4>``; ``soft`` writes a two-hot mixture of neighbours, else the nearest."""

    between = " "

    def __init__(self, *, count: int = 5, soft: bool = True) -> None:
        self.count, self.soft = count, soft

    def words(self) -> list[str]:
        return [f"<t{n}>" for n in range(self.count)]

    def resolution(self, duration: float) -> float:
        return duration / (self.count - 1) / 2

    def moment(self, seconds: float, duration: float) -> Sequence[Piece]:
        place = seconds / duration * (self.count - 1)
        low = math.floor(place)
        if not self.soft or place == low:
            return [f"<t{round(place)}>"]
        return [Mixture({f"<t{low}>": low + 1 - place, f"<t{low + 1}>": place - low})]

    def find(self, text: str, duration: float) -> list[Mention]:
        matches = re.finditer(r"<t(\d+)>", text)
        return [Mention(*m.span(), int(m[1]) / (self.count - 1) * duration) for m in matches]
