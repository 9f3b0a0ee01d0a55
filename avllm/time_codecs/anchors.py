"""Write times as mixtures of two neighbouring words: LLaVA-ST's anchors (arXiv 2501.08282, 3.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from avllm.time_codecs.base import Mixture, Piece
from avllm.time_codecs.time_tokens import TimeTokens


class Anchors(TimeTokens):
    """Spread added words evenly over the clip, and write a moment as the two that surround it.

    The nearer an anchor, the larger its weight, so that the target of ``next_token`` is a soft one
    with the moment as its mean (two-hot). An answer names one word, the likeliest, and is read as
    that anchor's second.

    Args:
        number: of anchors; LLaVA-ST has 100.
        word: how each is written, ``{}`` standing for its number.
    """

    def moment(self, seconds: float, duration: float) -> Sequence[Piece]:
        place = self.place(seconds, duration)
        low = min(math.floor(place), self.number - 2)
        share = place - low
        weights = {self.word.format(low): 1 - share, self.word.format(low + 1): share}
        return [Mixture({word: weight for word, weight in weights.items() if weight > 0})]
