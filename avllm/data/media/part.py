"""Decode the media parts of a row: choose loader and tracks of each file, and read it once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

from avllm.data.media.errors import MediaError
from avllm.data.media.load import Clip, RegionBox, Sampling, load_audio, load_image, load_video
from avllm.data.schema import AudioPart, ImagePart, MediaPart, VideoPart, resolve
from avllm.data.store.access import AccessError
from avllm.data.store.http import FetchError
from avllm.data.store.storage import check_access

LOUDEST_FIRST: tuple[Literal["on", "auto", "off"], ...] = ("on", "auto", "off")


class Stretch(NamedTuple):
    """Identify what one decode reads: an interval and a sound track of a file, or a picture."""

    path: Path
    start: float | None = None
    end: float | None = None
    still: bool = False
    track: int | None = None

    @classmethod
    def of(cls, part: MediaPart, root: Path | None) -> Stretch:
        """Return the stretch of a part; a relative path is relative to ``root``."""
        path = resolve(part, root)
        if isinstance(part, ImagePart):
            return cls(path, still=True)
        return cls(path, part.start, part.end, track=part.track)


def load_parts(
    parts: Sequence[MediaPart],
    root: Path | None,
    *,
    sampling: Sampling | None,
    rate: int | None,
    more_rates: Sequence[int] = (),
    timeout: float = 60.0,
) -> list[Clip]:
    """Decode media parts; those with the same interval of a file share one open and one decode.

    Their clips share tensors, so these must not be changed in place.

    Args:
        parts: which files and intervals, usually of one row.
        root: the folder that a relative path is relative to.
        sampling: which frames of a video; None = no frames.
        rate: samples a second of the sound; None = a video's sound is not read.
        more_rates: further ones, for ``Clip.more_sounds``.
        timeout: seconds for each file.

    Returns:
        a clip for each part, in order, equal to the clip of the part alone.

    Raises:
        MediaError: with the reason. ValueError: there is an audio part, and no rate.
    """
    stretches = [Stretch.of(part, root) for part in parts]
    parts_by_stretch: dict[Stretch, list[MediaPart]] = {}
    for stretch, part in zip(stretches, parts, strict=True):
        parts_by_stretch.setdefault(stretch, []).append(part)
    clips: dict[Stretch, Clip] = {}
    for stretch, sharing in parts_by_stretch.items():
        try:
            check_access(stretch.path)
            clips[stretch] = _read(stretch, sharing, sampling, rate, more_rates, timeout)
        except (AccessError, FetchError) as error:
            raise MediaError(stretch.path, error.reason, str(error)) from error
    return [_tracks_of(clips[s], part) for s, part in zip(stretches, parts, strict=True)]


def _read(
    stretch: Stretch,
    parts: Sequence[MediaPart],
    sampling: Sampling | None,
    rate: int | None,
    more_rates: Sequence[int],
    timeout: float,
) -> Clip:
    """Read all tracks of a stretch that any of the parts needs."""
    path = stretch.path
    if stretch.still:
        return load_image(path)
    audio_parts = [part for part in parts if isinstance(part, AudioPart)]
    video_parts = [part for part in parts if isinstance(part, VideoPart)]
    if audio_parts and rate is None:
        raise ValueError(f"{path} is an audio part, and rate is None; expected samples a second")
    if not video_parts and rate is not None:
        return load_audio(
            path,
            rate=rate,
            more_rates=more_rates,
            start=stretch.start,
            end=stretch.end,
            timeout=timeout,
            track=stretch.track,
        )
    modes = {part.sound for part in video_parts}
    if audio_parts:
        modes.add("on")
    sound = next(mode for mode in LOUDEST_FIRST if mode in modes)
    return load_video(
        path,
        start=stretch.start,
        end=stretch.end,
        sampling=sampling,
        rate=None if sound == "off" else rate,
        more_rates=more_rates,
        sound=sound,
        timeout=timeout,
        track=stretch.track,
    )


def _tracks_of(clip: Clip, part: MediaPart) -> Clip:
    """Return the tracks that a part needs of the clip that was read for all parts."""
    if isinstance(part, AudioPart):
        return replace(clip, frames=None, unread=())
    if part.regions and clip.frames is not None:
        boxes = tuple(RegionBox(region.id, region.box, region.time) for region in part.regions)
        clip = replace(clip, frames=replace(clip.frames, regions=boxes))
    if isinstance(part, VideoPart) and part.sound == "off":
        unread = tuple(medium for medium in clip.unread if medium != "audio")
        return replace(clip, sound=None, more_sounds=(), unread=unread)
    return clip
