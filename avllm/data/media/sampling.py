"""Choose the moments of a clip that are read, by arithmetic on seconds alone."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from avllm.config_model import MOST_FPS, MOST_FRAMES, MOST_SIDE
from avllm.errors import UserError

MOST = {
    "num_frames": MOST_FRAMES,
    "fps": MOST_FPS,
    "max_frames": MOST_FRAMES,
    "short_side": MOST_SIDE,
}
FULL_HD = 1_080  # pixels of the shorter side; encoders take fewer, and an 8K frame is 100 MB


@dataclass(frozen=True)
class Sampling:
    """Say how many frames of a clip are read, and how large.

    Exactly one of ``num_frames`` and ``fps`` is given.

    Attributes:
        num_frames: this many, uniform over the clip, each at the centre of its segment.
        fps: this many a second, each at the centre of its step.
        max_frames: with ``fps``: a clip that would have more gets this many, uniform over it.
        short_side: pixels of the picture's shorter side; larger pictures are shrunk while decoding,
            smaller ones are not enlarged. Without it, pictures above Full HD are shrunk to 1,080.
    """

    num_frames: int | None = None
    fps: float | None = None
    max_frames: int | None = None
    short_side: int | None = None

    def __post_init__(self) -> None:
        if (self.num_frames is None) == (self.fps is None):
            seen = f"num_frames={self.num_frames} and fps={self.fps}"
            raise UserError(f"{seen}: give exactly one of the two", reason="not_one")
        for name, most in MOST.items():
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{name}={value}: expected a number above 0", reason="not_positive")
            if value is not None and value > most:
                raise UserError(f"{name}={value}: expected at most {most}", reason="too_large")

    def count(self, duration: float) -> int:
        """Return the number of steps T of a clip of ``duration`` seconds; 1 without duration."""
        if duration <= 0:
            return 1
        if self.num_frames is not None:
            return self.num_frames
        # Rounded, so that a clip of 10.01 s at 1 fps has no eleventh step of 10 ms.
        steps = max(1, round(duration * float(self.fps or 0)))
        return steps if self.max_frames is None else min(steps, self.max_frames)

    def spans(self, duration: float) -> list[tuple[float, float]]:
        """Return start and end in seconds of each of the T steps, from 0 to ``duration``."""
        steps = self.count(duration)
        capped = self.fps is None or steps < round(duration * self.fps)
        step = duration / steps if capped else 1.0 / float(self.fps or 1)
        edges = [i * step for i in range(steps)] + [duration]
        return list(itertools.pairwise(edges))

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Return width and height after shrinking to ``short_side`` with the same aspect."""
        short = min(width, height)
        most = self.short_side or FULL_HD
        if most >= short:
            return width, height
        return round(width * most / short), round(height * most / short)


def centres(spans: list[tuple[float, float]]) -> list[float]:
    """Return the moment of each step, its centre."""
    return [(first + last) / 2 for first, last in spans]
