"""Read media files as tensors: frames and sound of the same interval, on one clock.

Every call gives the same tensors. The clip's second 0 is the interval's start. ``open.py``,
``frames.py``, ``sound.py`` and ``backends.py`` do the work; the rest of the package calls the
functions of this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from avllm.data.media.backends import BACKENDS, read_with
from avllm.data.media.clip import (
    Clip,
    Frames,
    MediaInfo,
    Note,
    RegionBox,
    Sound,
    check_frames_fit,
)
from avllm.data.media.container.length import interval
from avllm.data.media.container.reread import reading
from avllm.data.media.container.tracks import pixel_aspect
from avllm.data.media.errors import REASONS, MediaError
from avllm.data.media.frames import read_frames
from avllm.data.media.headers import probe
from avllm.data.media.open import OpenMedia, is_picture, no_track, open_media, require_file
from avllm.data.media.pictures.animation import is_animation, read_animation
from avllm.data.media.pictures.still import load_image
from avllm.data.media.sampling import Sampling, centres
from avllm.data.media.sound import IntervalSound, read_sound

__all__ = [
    "BACKENDS",
    "REASONS",
    "Clip",
    "Frames",
    "MediaError",
    "MediaInfo",
    "Note",
    "RegionBox",
    "Sampling",
    "Sound",
    "is_animation",
    "is_picture",
    "load_audio",
    "load_image",
    "load_video",
    "probe",
]

SOUND_MODES = ("auto", "on", "off")


def load_video(
    path: str | Path,
    *,
    start: float | None = None,
    end: float | None = None,
    sampling: Sampling | None,
    rate: int | None,
    more_rates: Sequence[int] = (),
    sound: Literal["auto", "on", "off"] = "auto",
    backend: str = "auto",
    timeout: float = 60.0,
    threads: int = 1,
    track: int | None = None,
) -> Clip:
    """Read frames and sound of the same interval of a file, with one open.

    Args:
        path: a file with a video track.
        start: seconds of the file; None = its beginning.
        end: seconds of the file; None, or later than the file's end = its end.
        sampling: which frames; None = no frames.
        rate: samples a second of the sound; None = no sound.
        more_rates: further ones, for ``Clip.more_sounds``.
        sound: ``auto`` = read when the interval has any, ``on`` = required, ``off`` = not read.
        backend: one of ``BACKENDS``; all give the same frames, ``auto`` is the fastest.
        timeout: seconds, checked between packets, or between frames where another back end decodes
            them; a call that hangs within a library ends only with its process.
        threads: of the decoder.
        track: number of the sound track, from 0; None = the default one.

    Raises:
        MediaError: with the reason; see ``REASONS``.
    """
    if sound not in SOUND_MODES:
        raise ValueError(f"sound={sound!r}; expected one of {', '.join(SOUND_MODES)}")
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}; expected one of {', '.join(BACKENDS)}")
    require_file(path)
    if is_animation(path):
        if sound == "on":
            raise MediaError(path, "no_audio", "an animated picture has no sound track")
        return read_animation(path, start, end, sampling, timeout)
    rates = [] if rate is None or sound == "off" else [rate, *more_rates]
    read = partial(
        _read_video,
        start=start,
        end=end,
        sampling=sampling,
        rates=rates,
        required=sound == "on",
        is_meant=sound != "off",
        backend=backend,
    )
    with open_media(path, timeout, threads, track) as media:
        return reading(media, read)


def _read_video(
    media: OpenMedia,
    *,
    start: float | None,
    end: float | None,
    sampling: Sampling | None,
    rates: Sequence[int],
    required: bool,
    is_meant: bool,
    backend: str,
) -> Clip:
    if media.video is None and sampling is not None:
        detail = "the file has no video track; give it as an audio part"
        raise no_track(media.path, "no_video", detail)
    first, last = interval(media, start, end)
    clip_frames: Frames | None = None
    if sampling is not None:
        clip_frames = _frames(media, first, last, sampling, backend)
    sounds, notes = _sounds(media, first, last, rates, required)
    return Clip(
        clip_frames,
        sounds[0] if sounds else None,
        last - first,
        sounds[1:],
        notes,
        _unread(media, sampling, rates, is_meant),
    )


def _unread(
    media: OpenMedia, sampling: Sampling | None, rates: Sequence[int], is_meant: bool
) -> tuple[Literal["video", "audio"], ...]:
    """Return the tracks that the file has and that were not asked for; sound if it is meant."""
    unread: list[Literal["video", "audio"]] = []
    if sampling is None and media.video is not None:
        unread.append("video")
    if not rates and is_meant and media.audio is not None:
        unread.append("audio")
    return tuple(unread)


def load_audio(
    path: str | Path,
    *,
    rate: int,
    more_rates: Sequence[int] = (),
    start: float | None = None,
    end: float | None = None,
    timeout: float = 60.0,
    track: int | None = None,
) -> Clip:
    """Read the sound of a file or of an interval of it (seconds of the file); ``frames`` is None.

    ``track`` is the number of the sound track, from 0; None = the default one.

    Raises:
        MediaError: with the reason; ``no_audio`` when the file has no sound in the interval.
    """
    require_file(path)
    if is_animation(path):
        raise MediaError(path, "no_audio", "an animated picture has no sound track")
    read = partial(_read_audio, start=start, end=end, rates=[rate, *more_rates])
    with open_media(path, timeout, track=track) as media:
        return reading(media, read)


def _read_audio(
    media: OpenMedia,
    *,
    start: float | None,
    end: float | None,
    rates: Sequence[int],
) -> Clip:
    first, last = interval(media, start, end)
    sounds, notes = _sounds(media, first, last, rates, required=True)
    return Clip(None, sounds[0], last - first, sounds[1:], notes)


def _frames(
    media: OpenMedia,
    first: float,
    last: float,
    sampling: Sampling,
    backend: str,
) -> Frames:
    assert media.video is not None
    codec = media.video.codec_context
    size = sampling.size(round(codec.width * pixel_aspect(media.video)), codec.height)
    check_frames_fit(media.path, sampling.count(last - first), *size)
    spans = sampling.spans(last - first)
    moments = [first + centre for centre in centres(spans)]
    if backend in ("auto", "pyav"):
        pixels = read_frames(media, moments, last, sampling)
    else:
        pixels = read_with(backend, media, moments, last, sampling, media.threads)
    return Frames(torch.from_numpy(pixels), torch.tensor(spans, dtype=torch.float32))


def _sounds(
    media: OpenMedia,
    first: float,
    last: float,
    rates: Sequence[int],
    required: bool,
) -> tuple[tuple[Sound, ...], tuple[Note, ...]]:
    """Read the interval's sound at each rate, and notes on it; return no sound where there is none.

    Raises:
        MediaError: no_audio, when it is required and there is none.
    """
    if not rates:
        return (), ()
    heard = IntervalSound(())
    if media.audio is not None:
        heard = read_sound(media, first, last, rates)
    if required and not heard.at_rates:
        empty = "the file has no sound track" if media.audio is None else "the sound track is empty"
        detail = f"{empty} between {first:.3f} and {last:.3f} s"
        raise no_track(media.path, "no_audio", detail)
    if len(heard.at_rates) < len(rates):  # less than a sample at the lowest rate: no sound at all
        return (), ()
    sounds = []
    for resampled, rate in zip(heard.at_rates, rates, strict=True):
        sounds.append(Sound(resampled.samples, rate, max(0.0, resampled.start - first)))
    return tuple(sounds), heard.notes
