"""Represent a moment or a span of a clip, and write it in words: seconds, to a tenth."""

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
            raise ValueError(f"a time begins at {self.start} s; expected 0 or more seconds")
        if self.end is not None and not self.end > self.start:
            seen = f"a span begins at {self.start} s and ends at {self.end} s"
            raise ValueError(f"{seen}; expected a later end")

    @property
    def last(self) -> float:
        """Return the latest second: the end of a span, or the moment itself."""
        return self.start if self.end is None else self.end


def say_moment(seconds: float, decimals: int = 1) -> str:
    """Write seconds as ``1.5 s``."""
    return f"{seconds:.{decimals}f} s"


def say_time(time: Time, decimals: int = 1) -> str:
    """Write a moment as ``1.5 s`` and a span as ``1.5 s to 3.0 s``."""
    if time.end is None:
        return say_moment(time.start, decimals)
    return f"{say_moment(time.start, decimals)} to {say_moment(time.end, decimals)}"
