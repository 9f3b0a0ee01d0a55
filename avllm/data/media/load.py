"""Read media files as tensors: frames and sound of the same interval, on one clock.

Every call gives the same tensors. The clip's second 0 is the interval's start. ``open.py``,
``frames.py``, ``sound.py`` and ``backends.py`` do the work; the rest of the package calls the
functions of this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torchaudio
from PIL import Image, ImageOps, UnidentifiedImageError

from avllm.data.media.backends import BACKENDS, read_with
from avllm.data.media.display import display_matrix, displayed_size, rotation
from avllm.data.media.frames import first_frame, read_frames
from avllm.data.media.open import (
    BROKEN_PICTURE,
    MAX_PIXELS,
    REASONS,
    MediaError,
    OpenMedia,
    file_duration,
    is_picture,
    no_track,
    open_media,
    require_file,
    stream_end,
)
from avllm.data.media.sampling import Sampling, centres
from avllm.data.media.sound import read_sound
from avllm.data.media.window import read_window
from avllm.data.store.storage import open_bytes

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "BACKENDS",
    "REASONS",
    "Clip",
    "Frames",
    "MediaError",
    "MediaInfo",
    "RegionBox",
    "Sampling",
    "Sound",
    "is_picture",
    "load_audio",
    "load_image",
    "load_video",
    "probe",
]

SOUND_MODES = ("auto", "on", "off")


@dataclass(frozen=True)
class RegionBox:
    """A region of the pictures of a clip.

    Attributes:
        id: its name in the row.
        box: x0, y0, x1, y1 as shares (0 to 1) of the displayed picture's width and height, from its upper left corner.
        time: second of the clip at which it is there; None for all of it.
    """

    id: str
    box: tuple[float, float, float, float]
    time: float | None = None


@dataclass(frozen=True)
class Frames:
    """Hold the pictures of a clip.

    Attributes:
        x: uint8 RGB, ``(T, H, W, 3)``.
        span: float32 ``(T, 2)``, start and end of each step in seconds of the clip; contiguous, the
            last ends with the clip.
        regions: what the row names in them.
    """

    x: Tensor
    span: Tensor
    regions: tuple[RegionBox, ...] = ()


@dataclass(frozen=True)
class Sound:
    """Hold the sound of a clip.

    Attributes:
        x: float32 ``(S,)``, the mean of all channels, full scale 1.
        rate: samples a second.
        start: second of the clip at which ``x[0]`` is heard; above 0 when the track starts late.
    """

    x: Tensor
    rate: int
    start: float


@dataclass(frozen=True)
class Clip:
    """Hold frames and sound of an interval of a file.

    Attributes:
        frames: None when the clip has no picture, or none was read.
        sound: None when the clip has no sound, or none was read.
        duration: seconds.
        more_sounds: the same sound at further rates, for audio encoders with different rates.
    """

    frames: Frames | None
    sound: Sound | None
    duration: float
    more_sounds: tuple[Sound, ...] = ()

    @property
    def size(self) -> int:
        """Return the bytes of the decoded tensors."""
        tracks = [track for track in (self.frames, self.sound, *self.more_sounds) if track is not None]
        return sum(track.x.numel() * track.x.element_size() for track in tracks)

    def sound_at(self, rate: int) -> Sound:
        """Return the sound at one of the rates that were read.

        A sound that was changed after decoding has no further rates; it is resampled.

        Raises:
            ValueError: the clip has no sound.
        """
        if self.sound is None:
            raise ValueError(f"the clip has no sound; expected one to be heard at {rate} Hz")
        for sound in (self.sound, *self.more_sounds):
            if sound.rate == rate:
                return sound
        x = torchaudio.functional.resample(self.sound.x, self.sound.rate, rate)
        return Sound(x, rate, self.sound.start)


@dataclass(frozen=True)
class MediaInfo:
    """Describe a file by its headers and its first frame.

    Times are in seconds, sizes in pixels as displayed (after rotation), rates in Hz.
    """

    duration: float
    has_video: bool
    has_audio: bool
    width: int | None = None
    height: int | None = None
    fps: float | None = None
    num_frames: int | None = None
    rotation: int = 0
    video_codec: str | None = None
    audio_rate: int | None = None
    audio_channels: int | None = None
    audio_start: float | None = None
    audio_duration: float | None = None
    audio_codec: str | None = None
    edit_list: bool = False
    container: str = ""
    video_duration: float | None = None


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

    Raises:
        MediaError: with the reason; see ``REASONS``.
    """
    if sound not in SOUND_MODES:
        raise ValueError(f"sound={sound!r}; expected one of {', '.join(SOUND_MODES)}")
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}; expected one of {', '.join(BACKENDS)}")
    with open_media(path, timeout, threads) as media:
        if media.video is None and sampling is not None:
            raise no_track(
                path,
                "no_video",
                "the file has no video track; give it as an audio part",
            )
        first, last = media.interval(start, end)
        clip_frames: Frames | None = None
        if sampling is not None:
            clip_frames = _frames(media, first, last, sampling, backend, threads)
        rates = [] if rate is None or sound == "off" else [rate, *more_rates]
        sounds = _sounds(media, first, last, rates, required=sound == "on")
    return Clip(clip_frames, sounds[0] if sounds else None, last - first, sounds[1:])


def load_audio(
    path: str | Path,
    *,
    rate: int,
    more_rates: Sequence[int] = (),
    start: float | None = None,
    end: float | None = None,
    timeout: float = 60.0,
) -> Clip:
    """Read the sound of a file or of an interval of it (seconds of the file); ``frames`` is None.

    Raises:
        MediaError: with the reason; ``no_audio`` when the file has no sound in the interval.
    """
    with open_media(path, timeout) as media:
        first, last = media.interval(start, end)
        sounds = _sounds(media, first, last, [rate, *more_rates], required=True)
        return Clip(None, sounds[0], last - first, sounds[1:])


def load_image(path: str | Path) -> Clip:
    """Read a still image as a clip of one frame, with ``span`` [[0, 0]] and duration 0.

    It is turned as its EXIF data say. Transparent pixels become white. Animations give their first
    frame.

    Raises:
        MediaError: missing, zero_byte, undecodable, absurd_header, truncated.
    """
    require_file(path)
    try:
        with open_bytes(path) as file, Image.open(file) as image:
            if image.width * image.height > MAX_PIXELS:
                seen = f"{image.width}x{image.height} pixels; the limit is {MAX_PIXELS} in all"
                raise MediaError(path, "absurd_header", seen)
            pixels = _rgb(ImageOps.exif_transpose(image))
    except MediaError:
        raise
    except Image.DecompressionBombError as error:
        least = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        seen = f"more than {least:,} pixels; the limit is {MAX_PIXELS:,}"
        raise MediaError(path, "absurd_header", f"the header declares {seen}") from error
    except UnidentifiedImageError as error:
        raise MediaError(
            path,
            "undecodable",
            "it is no picture of a format that Pillow reads",
        ) from error
    except BROKEN_PICTURE as error:
        reason = "truncated" if "truncated" in str(error).lower() else "undecodable"
        raise MediaError(path, reason, str(error)) from error
    x = torch.from_numpy(pixels)[None]  # (1, H, W, 3)
    return Clip(Frames(x, torch.zeros(1, 2)), None, 0.0)


def probe(path: str | Path, timeout: float = 60.0) -> MediaInfo:
    """Read the headers of a video or sound file, and its first frame for the rotation.

    Raises:
        MediaError: missing, zero_byte, undecodable, absurd_header, truncated, timeout; ``no_video``
            when there is neither video nor sound in the file.
    """
    with open_media(path, timeout) as media:
        if media.video is None and media.audio is None:
            raise no_track(path, "no_video", "the file has neither a video nor a sound track")
        duration = file_duration(media)
        fields = {**_video_info(media), **_audio_info(media)}
        container = media.container.format.name
    has_video = media.video is not None
    has_audio = media.audio is not None
    return MediaInfo(duration, has_video, has_audio, container=container, **fields)


def _frames(
    media: OpenMedia,
    first: float,
    last: float,
    sampling: Sampling,
    backend: str,
    threads: int,
) -> Frames:
    spans = sampling.spans(last - first)
    moments = [first + centre for centre in centres(spans)]
    if backend in ("auto", "pyav"):
        pixels = read_frames(media, moments, last, sampling)
    else:
        pixels = read_with(backend, media, moments, last, sampling, threads)
    return Frames(torch.from_numpy(pixels), torch.tensor(spans, dtype=torch.float32))


def _sounds(
    media: OpenMedia,
    first: float,
    last: float,
    rates: Sequence[int],
    required: bool,
) -> tuple[Sound, ...]:
    """Read the interval's sound at each rate; return nothing where there is none.

    Raises:
        MediaError: no_audio, when it is required and there is none.
    """
    if not rates:
        return ()
    sounds = [] if media.audio is None else read_sound(media, first, last, rates)
    if required and not sounds:
        empty = "the file has no sound track" if media.audio is None else "the sound track is empty"
        detail = f"{empty} between {first:.3f} and {last:.3f} s"
        raise no_track(media.path, "no_audio", detail)
    if len(sounds) < len(rates):  # less than one sample at the lowest rate: no sound at all
        return ()
    placed = []
    for (samples, start), rate in zip(sounds, rates, strict=True):
        placed.append(Sound(samples, rate, max(0.0, start - first)))
    return tuple(placed)


def _rgb(image: Image.Image) -> np.ndarray:
    """Return the pixels ``(H, W, 3)`` of an image of any mode."""
    if image.mode.startswith("I"):  # 16 bits; Pillow's conversion turns everything above 255 white
        grey = (np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, -1)  # (H, W, 3)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.array(image.convert("RGB"))  # (H, W, 3)


def _video_info(media: OpenMedia) -> dict[str, Any]:
    if media.video is None:
        return {}
    window = read_window(media, 0.0, 0.0)
    frame = first_frame(media, window)
    width, height = displayed_size(frame)
    rate = media.video.average_rate
    return {
        "width": width,
        "height": height,
        "fps": float(rate) if rate else None,
        "num_frames": media.video.frames or None,
        "rotation": rotation(display_matrix(frame)),
        "video_codec": media.video.codec_context.name,
        "edit_list": window.cut,
        "video_duration": stream_end(media, media.video),
    }


def _audio_info(media: OpenMedia) -> dict[str, Any]:
    if media.audio is None:
        return {}
    stream = media.audio
    start = media.second(stream.start_time or 0, stream.time_base)
    end = stream_end(media, stream)
    return {
        "audio_rate": stream.codec_context.sample_rate,
        "audio_channels": stream.codec_context.layout.nb_channels,
        "audio_start": start,
        "audio_duration": None if end is None else end - start,
        "audio_codec": stream.codec_context.name,
    }
