"""The media parts of a row -> their clips: which loader reads a file, with which tracks, and that it reads it once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

from avllm.data.media.load import Clip, Sampling, load_audio, load_image, load_video
from avllm.data.schema import AudioPart, ImagePart, MediaPart, VideoPart, resolve

LOUDEST_FIRST: tuple[Literal["on", "auto", "off"], ...] = ("on", "auto", "off")


class Stretch(NamedTuple):
    """What parts have in common that one decode serves: the file and the interval of it; or a still picture."""

    path: Path
    start: float | None = None
    end: float | None = None
    still: bool = False

    @classmethod
    def of(cls, part: MediaPart, root: Path | None) -> Stretch:
        """What a part shows; a relative path is relative to ``root``."""
        path = resolve(part, root)
        return cls(path, still=True) if isinstance(part, ImagePart) else cls(path, part.start, part.end)


def load_parts(
    parts: Sequence[MediaPart],
    root: Path | None,
    *,
    sampling: Sampling | None,
    rate: int | None,
    more_rates: Sequence[int] = (),
    timeout: float = 60.0,
) -> list[Clip]:
    """Decode media parts; those that show the same interval of a file share one open of it and one decode.

    What they share they hold together: tensors of a clip are not to be changed in place.

    Args:
        parts: which files and intervals, usually of one row.
        root: the folder that a relative path is relative to.
        sampling: which frames of a video; None = no frames.
        rate: samples a second of the sound; None = a video's sound is not read.
        more_rates: further ones, for ``Clip.more_sounds``.
        timeout: seconds for each file.

    Returns:
        a clip a part, in order; the same that the part alone would be.

    Raises:
        MediaError: with the reason. ValueError: an audio part and no rate.
    """
    wanted: dict[Stretch, list[MediaPart]] = {}
    for part in parts:
        wanted.setdefault(Stretch.of(part, root), []).append(part)
    read = {s: _read(s, asked, sampling, rate, more_rates, timeout) for s, asked in wanted.items()}
    return [_tracks(read[Stretch.of(part, root)], part) for part in parts]


def _read(
    stretch: Stretch,
    parts: Sequence[MediaPart],
    sampling: Sampling | None,
    rate: int | None,
    more_rates: Sequence[int],
    timeout: float,
) -> Clip:
    """All that any of the parts wants of a file."""
    path, start, end, still = stretch
    if still:
        return load_image(path)
    sounds = {"on" if isinstance(part, AudioPart) else part.sound for part in parts if not isinstance(part, ImagePart)}
    sound = next(mode for mode in LOUDEST_FIRST if mode in sounds)
    if rate is None and any(isinstance(part, AudioPart) for part in parts):
        raise ValueError(f"{path} is to be heard, but rate is None; expected samples a second")
    if rate is not None and not any(isinstance(part, VideoPart) for part in parts):
        return load_audio(path, rate=rate, more_rates=more_rates, start=start, end=end, timeout=timeout)
    asked = None if sound == "off" else rate
    return load_video(
        path,
        start=start,
        end=end,
        sampling=sampling,
        rate=asked,
        more_rates=more_rates,
        sound=sound,
        timeout=timeout,
    )


def _tracks(clip: Clip, part: MediaPart) -> Clip:
    """What a part wants of the clip that was read for all."""
    if isinstance(part, AudioPart):
        return replace(clip, frames=None)
    if isinstance(part, VideoPart) and part.sound == "off":
        return replace(clip, sound=None, more_sounds=())
    return clip
