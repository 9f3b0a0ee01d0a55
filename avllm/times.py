"""A moment or a span of a clip, and the words in which people say it: seconds, to a tenth."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Time:
    """A moment (``end`` is None) or a span, in seconds of a clip.

    Raises:
        ValueError: it begins before the clip, or does not end after its start.
    """

    start: float
    end: float | None = None

    def __post_init__(self) -> None:
        if not self.start >= 0:
            raise ValueError(f"a time begins at {self.start} s; expected 0 or more seconds of the clip")
        if self.end is not None and not self.end > self.start:
            raise ValueError(
                f"a span ends at {self.end} s and begins at {self.start} s; expected an end after the start"
            )

    @property
    def last(self) -> float:
        """Return the latest second: the end of a span, or the moment itself."""
        return self.start if self.end is None else self.end


def say_moment(seconds: float, decimals: int = 1) -> str:
    """Return ``1.5 s``."""
    return f"{seconds:.{decimals}f} s"


def say_time(time: Time, decimals: int = 1) -> str:
    """Return ``1.5 s``, or ``1.5 s to 3.0 s`` for a span."""
    if time.end is None:
        return say_moment(time.start, decimals)
    return f"{say_moment(time.start, decimals)} to {say_moment(time.end, decimals)}"
