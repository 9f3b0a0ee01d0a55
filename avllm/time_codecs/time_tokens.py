"""Write times as added words, relative to the clip: LITA's time tokens (arXiv 2403.19046)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from avllm.time_codecs.base import Mention, Piece, TimeCodec


class TimeTokens(TimeCodec):
    """Write one of ``number`` added words, from the clip's start to its end (LITA, section 3.2).

    A moment tau of a clip that lasts L seconds is word number ``round((number - 1) * tau / L)``.

    Args:
        number: of words; LITA has 100.
        word: how each is written, ``{}`` standing for its number.

    Raises:
        ValueError: fewer than two words, or a pattern without its number.
    """

    def __init__(self, *, number: int = 100, word: str = "<time_{}>") -> None:
        if number < 2:
            raise ValueError(f"time_tokens has number {number}; expected 2 or more")
        if word.count("{}") != 1:
            raise ValueError(
                f"time_tokens has word {word!r}; expected a text with one {{}} for the number"
            )
        self.number = number
        self.word = word
        before, after = map(re.escape, word.split("{}"))
        self._moment = re.compile(rf"{before}(\d+){after}")

    def words(self) -> list[str]:
        return [self.word.format(index) for index in range(self.number)]

    def resolution(self, duration: float) -> float:
        """Return half the distance of two words, L / (2 (number - 1))."""
        return duration / (2 * (self.number - 1))

    def place(self, seconds: float, duration: float) -> float:
        """Return where a moment lies between the words, from 0 to ``number - 1``."""
        share = seconds / duration if duration > 0 else 0.0
        return min(max(share, 0.0), 1.0) * (self.number - 1)

    def moment(self, seconds: float, duration: float) -> Sequence[Piece]:
        return [self.word.format(round(self.place(seconds, duration)))]

    def find(self, text: str, duration: float) -> list[Mention]:
        mentions: list[Mention] = []
        for match in self._moment.finditer(text):
            index = int(match[1])
            if index < self.number:
                mentions.append(Mention(*match.span(), index / (self.number - 1) * duration))
        return mentions
