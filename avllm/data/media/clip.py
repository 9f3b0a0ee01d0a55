"""Hold the content of a file: pictures and sound on one clock, and what its headers say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torchaudio

from avllm.config_model import MOST_FRAMES
from avllm.data.media.errors import MediaError

if TYPE_CHECKING:
    from torch import Tensor

MAX_BYTES = 8 * 2**30  # decoded frames, or decoded sound, of one clip


def check_frames_fit(path: str | Path, steps: int, width: int, height: int) -> None:
    """Refuse frames that would take too much memory, before any is read.

    Raises:
        MediaError: undecodable.
    """
    size = steps * width * height * 3
    if size > MAX_BYTES or steps > MOST_FRAMES:
        seen = f"{steps} frames of {width}x{height} pixels take {size} bytes"
        limit = f"the limit is {MOST_FRAMES} frames and {MAX_BYTES} bytes"
        detail = f"{seen}; {limit}; ask for fewer frames or a smaller short_side"
        raise MediaError(path, "undecodable", detail)


class Note(NamedTuple):
    """Say what reading a file had to do, or left out, and a person should know.

    Attributes:
        reason: a key of the check's reasons, of severity ``warning``.
        detail: what was seen.
    """

    reason: str
    detail: str


@dataclass(frozen=True)
class RegionBox:
    """A region of the pictures of a clip.

    Attributes:
        id: its name in the row.
        box: x0, y0, x1, y1 as shares (0 to 1) of the displayed width and height, from the upper
            left corner.
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
        x: float32 ``(S,)``, the mean of the channels, full scale 1; see ``sound.py``.
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
        notes: what reading it had to do that is worth a warning.
        unread: ``video`` or ``audio``, where the file has it and the row means it, but no encoder
            of the model takes it in.
    """

    frames: Frames | None
    sound: Sound | None
    duration: float
    more_sounds: tuple[Sound, ...] = ()
    notes: tuple[Note, ...] = ()
    unread: tuple[Literal["video", "audio"], ...] = ()

    @property
    def size(self) -> int:
        """Return the bytes of the decoded tensors."""
        tracks = [
            track for track in (self.frames, self.sound, *self.more_sounds) if track is not None
        ]
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

    Times are in seconds, sizes in pixels as displayed (after rotation, with square pixels), rates
    in Hz. ``notes`` are those that need no decode but the first frame's.
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
    sound_tracks: int = 0
    notes: tuple[Note, ...] = ()
