"""Define a time codec, which writes times of a clip as text and reads them from an answer.

Manifests and answers hold seconds; how the LLM gets them is the codec's business alone. A codec may
use words that the LLM does not have (``words``): they become added words of the model, with rows
that train (LITA, arXiv 2403.19046). A time between two such words may be written as a mixture of
both, which is a soft target for ``next_token`` (anchors; LLaVA-ST, arXiv 2501.08282).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from avllm.times import Time, say_moment, say_time

OVERRUN = 0.1
"""Seconds after the clip's end that still mean the end, since annotators' players round up."""


class TimeError(ValueError):
    """Report a time that cannot be written.

    Attributes:
        reason: ``outside_clip`` or ``no_duration``.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class Mixture:
    """Fill one place of the text with several of the codec's words, by weight.

    Attributes:
        weights: by word, above 0; they sum to 1.

    Raises:
        ValueError: they do not.
    """

    weights: dict[str, float]

    def __post_init__(self) -> None:
        positive = all(weight > 0 for weight in self.weights.values())
        normalized = math.isclose(sum(self.weights.values()), 1.0, abs_tol=1e-6)
        if not positive or not normalized:  # an empty mixture sums to 0
            raise ValueError(
                f"a mixture has weights {self.weights}; expected some above 0 that sum to 1"
            )

    @property
    def word(self) -> str:
        """Return the heaviest word, which is what the text shows."""
        return max(self.weights, key=lambda word: self.weights[word])


Piece = str | Mixture


@dataclass(frozen=True)
class Mention:
    """Locate a moment in a text.

    Attributes:
        first, last: its characters, ``text[first:last]``.
        seconds: the moment, from the clip's start.
    """

    first: int
    last: int
    seconds: float


class TimeCodec:
    """Write and read times in one form; the keyword arguments of a codec are its options in YAML.

    A subclass writes and finds moments; spans are two moments with ``between`` between them.

    Attributes:
        between: written between start and end of a span.
        needs_duration: False where times are written without the clip's duration.
        rewrites: False where an answer already says seconds as it is generated.
    """

    between: ClassVar[str] = " to "
    needs_duration: ClassVar[bool] = True
    rewrites: ClassVar[bool] = True

    def words(self) -> list[str]:
        """Return the words that the LLM's vocabulary is to be extended by."""
        return []

    def resolution(self, duration: float) -> float:
        """Return the largest error in seconds of a moment that is written and read back."""
        raise NotImplementedError(f"{type(self).__name__}.resolution")

    def moment(self, seconds: float, duration: float) -> Sequence[Piece]:
        """Write a moment as pieces: text, which may hold the codec's words, or mixtures of these.

        Args:
            seconds: from 0 to ``duration``.
            duration: of the clip, in seconds.
        """
        raise NotImplementedError(f"{type(self).__name__}.moment")

    def find(self, text: str, duration: float) -> list[Mention]:
        """Find the moments that a text names in this codec's form, in order."""
        raise NotImplementedError(f"{type(self).__name__}.find")

    def write(self, time: Time, duration: float | None) -> list[Piece]:
        """Write a time of a clip that lasts ``duration`` seconds.

        Args:
            time: seconds of the clip. duration: None where it is not known.

        Raises:
            TimeError: ``outside_clip``: it lies after the clip's end. ``no_duration``: the codec
                needs one.
        """
        if duration is None:
            if self.needs_duration:
                detail = f"{say_time(time)} of a clip whose duration is not known"
                raise TimeError("no_duration", detail)
            duration = time.last
        if time.last > duration + OVERRUN:
            detail = f"{say_time(time)} of a clip that lasts {duration:.2f} s"
            raise TimeError("outside_clip", detail)
        pieces = list(self.moment(min(time.start, duration), duration))
        if time.end is not None:
            pieces += [self.between, *self.moment(min(time.end, duration), duration)]
        return pieces

    def read(self, text: str, duration: float) -> list[Time]:
        """Return the times that a text names, in order and in seconds.

        Args:
            text: an answer about a clip.
            duration: of the clip, in seconds.
        """
        times: list[Time] = []
        start: Mention | None = None  # of a span that the next mention may end
        for mention in self.find(text, duration):
            if start is not None and self._ends_span(start, mention, text):
                times[-1] = Time(start.seconds, mention.seconds)
                start = None
            else:
                times.append(Time(mention.seconds))
                start = mention
        return times

    def to_seconds(self, text: str, duration: float) -> str:
        """Return the text with every time in seconds; all other text is left alone.

        The result for the beginning of a text does not change when more follows after a space, so
        that answers can be shown while they are generated.
        """
        converted = ""
        position = 0  # in the text: everything before it is converted
        start: Mention | None = None  # of a span that the next mention may end
        for mention in self.find(text, duration):
            between = text[position : mention.first]
            ends_span = start is not None and self._ends_span(start, mention, text)
            if ends_span and between == self.between:
                between = " to "
            converted += between + say_moment(mention.seconds)
            position = mention.last
            start = None if ends_span else mention
        return converted + text[position:]

    def _ends_span(self, start: Mention, end: Mention, text: str) -> bool:
        between = text[start.last : end.first].strip()
        return between in (self.between.strip(), "-", "–") and end.seconds > start.seconds
