"""Media files to tensors: frames and sound of the same interval, on one clock, the same on every call.

The clip's second 0 is the interval's start. ``media_open.py``, ``media_frames.py``, ``media_sound.py`` and
``media_backends.py`` do the work; everything else in the package calls the functions here.
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
from avllm.data.media.frames import (
    Window,
    display_matrix,
    displayed_size,
    first_frame,
    read_frames,
    read_window,
    rotation,
)
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
class Frames:
    """Pictures of a clip.

    Attributes:
        x: uint8 RGB, ``(T, H, W, 3)``.
        span: float32 ``(T, 2)``, start and end of each step in seconds of the clip; contiguous, the last ends with the
            clip.
    """

    x: Tensor
    span: Tensor


@dataclass(frozen=True)
class Sound:
    """Sound of a clip.

    Attributes:
        x: float32 ``(S,)``, the mean of all channels, full scale 1.
        rate: samples a second.
        start: second of the clip at which ``x[0]`` stands; above 0 when the track starts late.
    """

    x: Tensor
    rate: int
    start: float


@dataclass(frozen=True)
class Clip:
    """Frames and sound of one interval of a file.

    Attributes:
        duration: seconds.
        more_sounds: the same sound at further rates, for a model whose audio encoders hear at several.
    """

    frames: Frames | None
    sound: Sound | None
    duration: float
    more_sounds: tuple[Sound, ...] = ()

    @property
    def size(self) -> int:
        """Bytes that the decoded tensors take."""
        parts = [part for part in (self.frames, self.sound, *self.more_sounds) if part is not None]
        return sum(part.x.numel() * part.x.element_size() for part in parts)

    def sound_at(self, rate: int) -> Sound:
        """Return the sound at one of the rates that were read.

        Where only ``sound`` is left, since it was changed after decoding, the others follow from it.

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
    """What a file's headers and its first frame say. Seconds, pixels as displayed (after rotation), Hz."""

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
        sound: ``auto`` = when the file has any in the interval, ``on`` = must have, ``off`` = not decoded.
        backend: one of ``BACKENDS``; all give the same frames, ``auto`` is the fastest.
        timeout: seconds, looked at between packets, or between frames where another back end decodes them; what hangs
            within a library ends with its process alone.
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
            raise no_track(path, "no_video", "the file has no video track; give it as an audio part")
        first, last = media.interval(start, end)
        frames = None if sampling is None else _frames(media, first, last, sampling, backend, threads)
        rates = [] if rate is None or sound == "off" else [rate, *more_rates]
        sounds = _sounds(media, first, last, rates, required=sound == "on")
    return Clip(frames, sounds[0] if sounds else None, last - first, sounds[1:])


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
    """Read a still image as a clip of one frame, ``span`` [[0, 0]] and duration 0; turned as its EXIF data says.

    Transparent pixels become white. Animations give their first frame.

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
        seen = f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels; the limit is {MAX_PIXELS:,}"
        raise MediaError(path, "absurd_header", f"the header declares {seen}") from error
    except UnidentifiedImageError as error:
        raise MediaError(path, "undecodable", "it is no picture of a form that Pillow knows") from error
    except BROKEN_PICTURE as error:
        reason = "truncated" if "truncated" in str(error).lower() else "undecodable"
        raise MediaError(path, reason, str(error)) from error
    x = torch.from_numpy(pixels)[None]  # (1, H, W, 3)
    return Clip(Frames(x, torch.zeros(1, 2)), None, 0.0)


def probe(path: str | Path, timeout: float = 60.0) -> MediaInfo:
    """Headers of a video or sound file, and its first frame for the rotation.

    Raises:
        MediaError: missing, zero_byte, undecodable, absurd_header, truncated, timeout; ``no_video`` when there is
            neither video nor sound in the file.
    """
    with open_media(path, timeout) as media:
        if media.video is None and media.audio is None:
            raise no_track(path, "no_video", "the file has neither a video nor a sound track")
        duration = file_duration(media)
        fields = {**_video_info(media), **_audio_info(media), "container": media.container.format.name}
    return MediaInfo(duration, media.video is not None, media.audio is not None, **fields)


def _frames(media: OpenMedia, first: float, last: float, sampling: Sampling, backend: str, threads: int) -> Frames:
    spans = sampling.spans(last - first)
    moments = [first + centre for centre in centres(spans)]
    if backend in ("auto", "pyav"):
        pixels = read_frames(media, moments, last, sampling)
    else:
        pixels = read_with(backend, media, moments, last, sampling, threads)
    return Frames(torch.from_numpy(pixels), torch.tensor(spans, dtype=torch.float32))


def _sounds(media: OpenMedia, first: float, last: float, rates: Sequence[int], required: bool) -> tuple[Sound, ...]:
    """Return the interval's sound at each rate; nothing where there is none."""
    if not rates:
        return ()
    read = [] if media.audio is None else read_sound(media, first, last, rates)
    if required and not read:
        what = "the file has no sound track" if media.audio is None else "the sound track is empty"
        raise no_track(media.path, "no_audio", f"{what} between {first:.3f} and {last:.3f} s")
    if len(read) < len(rates):  # less than one sample at the lowest rate: no sound at all
        return ()
    begins = [max(0.0, start - first) for _, start in read]
    return tuple(Sound(x, rate, begin) for (x, _), rate, begin in zip(read, rates, begins, strict=True))


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion cuts everything above 255 to white
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
    window: Window = read_window(media, 0.0, 0.0)
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
