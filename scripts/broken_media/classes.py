"""Define classes of odd files: how one is made, and what a check has to report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from writing import write

FRONT = {"form": {"movflags": "faststart"}}
CONTAINERS: list[tuple[str, dict[str, Any]]] = [
    (".mkv", {}),
    (
        ".webm",
        {
            "codec": "libvpx-vp9",
            "sound": "libopus",
            "options": {"deadline": "realtime", "cpu-used": "8"},
        },
    ),
    (".avi", {"codec": "mpeg4", "sound": "libmp3lame"}),
    (".ts", {}),
    (".flv", {"rate": 44_100}),
    (".mov", {}),
    (".mpg", {"codec": "mpeg2video", "sound": "mp2", "fps": 25}),
    (".mp4", {"codec": "libx265", "options": {"x265-params": "log-level=none"}}),
]
SOUNDS = [
    (".wav", "pcm_s16le"),
    (".flac", "flac"),
    (".mp3", "libmp3lame"),
    (".ogg", "libopus"),
    (".m4a", "aac"),
]
SPOILT = ("undecodable", "truncated", "no_video", "no_audio", "empty_interval", "absurd_header")
Part = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Where a file goes, its number within its class, and the random numbers that it is made of."""

    folder: Path
    stem: str
    number: int
    draw: np.random.Generator

    def file(self, suffix: str) -> Path:
        """Its path with a suffix."""
        return self.folder / (self.stem + suffix)

    def clip(self, suffix: str = ".mp4", **options: Any) -> Path:
        """Write a clip."""
        return write(self.file(suffix), self.draw, **options)

    def sound(self, suffix: str = ".wav", codec: str = "pcm_s16le", **options: Any) -> Path:
        """Write a sound file."""
        return write(self.file(suffix), self.draw, codec=None, sound=codec, **options)

    def text(self, suffix: str, content: str | bytes) -> Path:
        """Write something else."""
        path = self.file(suffix)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def share(self, low: float, high: float) -> float:
        """Return a random number between two."""
        return float(self.draw.uniform(low, high))

    def one_of(self, choices: list[Any]) -> Any:
        """Return each of some choices in turn."""
        return choices[self.number % len(choices)]


@dataclass(frozen=True)
class Odd:
    """A class of files, and what a check has to say of it."""

    make: Callable[[Place], Part]
    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    either: bool = False


CLASSES: dict[str, Odd] = {}


def odd(*errors: str, warnings: tuple[str, ...] = (), either: bool = False) -> Callable[..., Any]:
    """Enter a maker into the classes under its name."""

    def enter(make: Callable[[Place], Part]) -> Callable[[Place], Part]:
        CLASSES[make.__name__] = Odd(make, errors, warnings, either)
        return make

    return enter


def video(path: Path, **more: Any) -> Part:
    """Return a video part."""
    return {"type": "video", "video": path.name, **more}


def audio(path: Path, **more: Any) -> Part:
    """Return an audio part."""
    return {"type": "audio", "audio": path.name, **more}


def image(path: Path) -> Part:
    """Return an image part."""
    return {"type": "image", "image": path.name}
