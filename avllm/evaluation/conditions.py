"""The same questions with a stream taken away or exchanged for another clip's: does the model look, does it listen?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from avllm.data.schema import MediaPart
from avllm.tokens import EncoderInput

Streams = dict[str, EncoderInput]
STREAMS = ("audio", "video")
NEIGHBOURS = 8  # files that are much alike, among which partners are drawn


@dataclass(frozen=True)
class Condition:
    """How the media of a row is changed before it is asked; the text never is.

    Attributes:
        without: a stream that is removed (no token of it is left), or ``both``.
        swap: a stream that is exchanged for another clip's.
    """

    without: Literal["audio", "video", "both"] | None = None
    swap: Literal["audio", "video"] | None = None

    def __post_init__(self) -> None:
        if self.without not in (None, "both", *STREAMS):
            raise ValueError(f"without is {self.without!r}; expected 'audio', 'video' or 'both'")
        if self.swap not in (None, *STREAMS):
            raise ValueError(f"swap is {self.swap!r}; expected 'audio' or 'video'")
        if self.without and self.swap:
            raise ValueError(f"both without={self.without!r} and swap={self.swap!r}; one change at a time")

    @property
    def name(self) -> str:
        """``as_is``, ``without_audio``, ``swapped_video``, ..."""
        if self.swap:
            return f"swapped_{self.swap}"
        return f"without_{self.without}" if self.without else "as_is"

    @property
    def removed(self) -> tuple[str, ...]:
        """The streams that this condition takes away."""
        if self.without is None:
            return ()
        return STREAMS if self.without == "both" else (self.without,)


AS_IS = Condition()


@dataclass(frozen=True)
class Unit:
    """A distinct media part of a manifest.

    Attributes:
        file: where it lies.
        seconds: how long it is.
        kinds: of the questions about it, sorted.
    """

    part: MediaPart
    file: str
    seconds: float
    kinds: tuple[str, ...] = ()


def remove(clip: Streams, streams: Iterable[str]) -> Streams:
    """The clip without some of its streams."""
    gone = set(streams)
    return {name: item for name, item in clip.items() if name not in gone}


def exchange(clip: Streams, other: Streams, stream: str) -> Streams:
    """The clip with one stream of another; whatever else it has stays, at its place in the dict."""
    return {name: other[name] if name == stream else item for name, item in clip.items()}


def partners(units: Iterable[Unit], seed: int) -> dict[MediaPart, MediaPart]:
    """For each media part one of **another file**; {} when there is one file only.

    Files are sorted by the kinds of questions asked about them, then by length, and cut into small blocks; each block
    is shuffled and turned by one place. So the questions still make sense of what they meet, no file meets itself, and
    each gives its stream away exactly once. The same seed gives the same partners.
    """
    by_file: dict[str, list[Unit]] = {}
    for unit in sorted(set(units), key=lambda u: u.part.model_dump_json()):
        by_file.setdefault(unit.file, []).append(unit)
    files = sorted(by_file, key=lambda f: (min(u.kinds for u in by_file[f]), max(u.seconds for u in by_file[f]), f))
    if len(files) < 2:
        return {}
    rng = np.random.default_rng([seed, len(files)])
    found: dict[MediaPart, MediaPart] = {}
    for block in np.array_split(np.array(files, dtype=object), max(1, len(files) // NEIGHBOURS)):
        turned = list(rng.permutation(block))
        for mine, theirs in zip(turned, turned[1:] + turned[:1], strict=True):
            given = by_file[theirs]
            found |= {unit.part: given[i % len(given)].part for i, unit in enumerate(by_file[mine])}
    return found
