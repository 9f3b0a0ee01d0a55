"""Define a time codec, which writes a time of a clip into the text of the LLM and reads times back out of an answer.

Manifests and answers hold seconds; how the LLM gets them is the codec's business alone. A codec may use words that the
LLM does not have (``words``): they become added words of the model, with rows that train (LITA, arXiv 2403.19046). A
time between two such words may be written as a mixture of both, which is a soft target for ``next_token`` (anchors;
LLaVA-ST, arXiv 2501.08282).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from avllm.times import Time, say_moment, say_time

OVERRUN = 0.1  # seconds by which a time may lie after the clip's end and mean the end: annotators' players round up


class TimeError(ValueError):
    """A time that cannot be written.

    Attributes:
        reason: ``outside_clip`` or ``no_duration``.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class Mixture:
    """One place of the text that several of the codec's words share.

    Attributes:
        weights: by word, above 0; they sum to 1.

    Raises:
        ValueError: they do not.
    """

    weights: dict[str, float]

    def __post_init__(self) -> None:
        positive = all(weight > 0 for weight in self.weights.values())
        if not self.weights or not positive or not math.isclose(sum(self.weights.values()), 1.0, abs_tol=1e-6):
            raise ValueError(f"a mixture has weights {self.weights}; expected some above 0 that sum to 1")

    @property
    def word(self) -> str:
        """Return the heaviest word, which is what the text shows."""
        return max(self.weights, key=lambda word: self.weights[word])


Piece = str | Mixture


@dataclass(frozen=True)
class Mention:
    """A moment in a text.

    Attributes:
        first, last: its characters, ``text[first:last]``. seconds: of the clip.
    """

    first: int
    last: int
    seconds: float


class TimeCodec:
    """A way to write times. A new one is one file; its keyword arguments are its options.

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
        """Write a moment, ``0 <= seconds <= duration``: text (words of :meth:`words` in it), or mixtures of words."""
        raise NotImplementedError(f"{type(self).__name__}.moment")

    def find(self, text: str, duration: float) -> list[Mention]:
        """Find the moments that a text names in this codec's form, in order."""
        raise NotImplementedError(f"{type(self).__name__}.find")

    def write(self, time: Time, duration: float | None) -> list[Piece]:
        """Write a time of a clip that lasts ``duration`` seconds.

        Args:
            time: seconds of the clip. duration: None where it is not known.

        Raises:
            TimeError: ``outside_clip``: it lies after the clip's end. ``no_duration``: the codec needs one.
        """
        if duration is None:
            if self.needs_duration:
                raise TimeError("no_duration", f"{say_time(time)} of a clip whose duration is not known")
            duration = time.last
        if time.last > duration + OVERRUN:
            raise TimeError("outside_clip", f"{say_time(time)} of a clip that lasts {duration:.2f} s")
        pieces = list(self.moment(min(time.start, duration), duration))
        if time.end is not None:
            pieces += [self.between, *self.moment(min(time.end, duration), duration)]
        return pieces

    def read(self, text: str, duration: float) -> list[Time]:
        """Return the times that a text names, in order, in seconds of a clip that lasts ``duration`` seconds."""
        times: list[Time] = []
        before: Mention | None = None
        for mention in self.find(text, duration):
            if before is not None and self._ends_span(before, mention, text):
                times[-1] = Time(before.seconds, mention.seconds)
                before = None
            else:
                times.append(Time(mention.seconds))
                before = mention
        return times

    def to_seconds(self, text: str, duration: float) -> str:
        """Say every time of a text in seconds; all other text is left alone.

        What is said of the beginning of a text does not change when more follows after a space, so that answers can be
        shown while they are generated.
        """
        said, at = "", 0
        before: Mention | None = None
        for mention in self.find(text, duration):
            between = text[at : mention.first]
            is_end = before is not None and self._ends_span(before, mention, text)
            said += " to " if is_end and between == self.between else between
            said += say_moment(mention.seconds)
            at, before = mention.last, None if is_end else mention
        return said + text[at:]

    def _ends_span(self, start: Mention, end: Mention, text: str) -> bool:
        between = text[start.last : end.first].strip()
        return between in (self.between.strip(), "-", "–") and end.seconds > start.seconds
