"""Turn decoded frames of any sample format and layout into mono samples that are numbers of sound.

Mono is the mean of all channels. Where channels cancel each other in the mean (a stereo recording
with one cable turned round is silence then), it is the channel with the most energy.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from avllm.data.media.clip import Note

if TYPE_CHECKING:
    from av.audio.frame import AudioFrame

PLANE_TYPES = {
    "u8": np.uint8,
    "s16": np.int16,
    "s32": np.int32,
    "s64": np.int64,
    "flt": np.float32,
    "dbl": np.float64,
}
# Power of the mean over that of the mean of unrelated channels, below which channels cancel: two
# channels of equal power have a correlation below -0.4 then, which no placing of microphones gives.
CANCELLED = 0.6
LOUDEST = 100.0  # largest sample, full scale 1; recordings in 32 bits without a limiter reach 10


class NoSoundError(ValueError):
    """Decoded samples are no sound: not finite, or far out of range."""


@dataclass
class ChannelPower:
    """Add up the power of each channel and of their mean, to notice that they cancel.

    Attributes:
        samples: that were added.
        sums: float64 ``(C + 1,)`` sums of the samples of each channel, and of the mean.
        squares: float64 ``(C + 1,)`` sums of their squares.
        comparable: False when the number of channels changed.
    """

    samples: int = 0
    sums: np.ndarray = field(default_factory=lambda: np.zeros(0))
    squares: np.ndarray = field(default_factory=lambda: np.zeros(0))
    comparable: bool = True

    def add(self, channels: list[np.ndarray], mean: np.ndarray) -> None:
        """Add consecutive samples ``(S,)`` of each channel, and of their mean."""
        count = len(channels)
        if not self.samples:
            self.sums = np.zeros(count + 1)
            self.squares = np.zeros(count + 1)
        if count + 1 != len(self.sums):
            self.comparable = False
            return
        self.samples += len(mean)
        sums = [float(channel.sum()) for channel in channels]
        self.sums += [*sums, sum(sums) / count]
        self.squares += [float(np.dot(signal, signal)) for signal in (*channels, mean)]

    def channel_alone(self) -> int | None:
        """Return the channel to take alone, the loudest; None where the mean is good."""
        if not self.comparable or not self.samples:
            return None
        # Without the mean value, which carries no sound.
        power = self.squares / self.samples - (self.sums / self.samples) ** 2
        count = len(power) - 1
        unrelated = power[:-1].sum() / count**2
        if power[-1] >= CANCELLED * unrelated or power[:-1].max() < 1e-12:
            return None
        return int(power[:-1].argmax())

    def note(self, channel: int) -> Note:
        """Say that a channel is taken alone."""
        return Note(
            "cancelling_channels",
            f"the mean of {len(self.sums) - 1} channels cancels; channel {channel} is taken alone",
        )


def kind_of(frame: AudioFrame) -> tuple[str, int]:
    """Return sample format and number of channels."""
    return frame.format.name, frame.layout.nb_channels


def channels_of(frames: list[AudioFrame]) -> list[np.ndarray]:
    """Return the samples of each channel of consecutive frames of one kind.

    Channels lie in a plane each, or interleaved in one plane. PyAV's ``to_ndarray`` is not used,
    since in 18.1 it reads past the end of frames with eight planes or more.

    Returns:
        for each channel float32 ``(S,)``, full scale 1.

    Raises:
        NoSoundError: samples are not finite, or far out of range.
    """
    sample_format = frames[0].format
    count = frames[0].layout.nb_channels
    interleaved = 1 if sample_format.is_planar else count  # channels in a plane
    dtype = PLANE_TYPES[sample_format.packed.name]
    size = interleaved * np.dtype(dtype).itemsize  # bytes of a sample in a plane
    planes: list[list[memoryview]] = [[] for _ in range(count // interleaved)]
    for frame in frames:
        used = frame.samples * size  # padding follows
        # Once a frame, since each access makes new objects.
        for pieces, plane in zip(planes, frame.planes, strict=False):
            pieces.append(memoryview(plane)[:used])
    channels: list[np.ndarray] = []
    for pieces in planes:
        content = b"".join(pieces)
        samples = np.frombuffer(content, dtype)
        if samples.dtype.kind == "f":
            _check_range(samples)
        channels.extend(full_scale(samples).reshape(-1, interleaved).T)
    return channels


def mean_of(channels: list[np.ndarray]) -> np.ndarray:
    """Return the mean of channels ``(S,)``."""
    if len(channels) == 1:
        return channels[0]
    total = channels[0] + channels[1]
    if len(channels) == 2:
        total *= np.float32(0.5)  # the same number as by a division, and sooner
        return total
    for channel in channels[2:]:
        total += channel
    total /= np.float32(len(channels))
    return total


def _check_range(samples: np.ndarray) -> None:
    """Raise ``NoSoundError`` unless all samples are finite and not far above full scale."""
    if not len(samples):
        return
    # No sample is larger than the root of the sum of squares, which is NaN when a sample is.
    with np.errstate(over="ignore", invalid="ignore"):
        if np.dot(samples, samples) <= LOUDEST**2:
            return
    low = float(samples.min())  # both are NaN when a sample is
    high = float(samples.max())
    if not (low >= -LOUDEST and high <= LOUDEST):
        seen = f"samples from {low:g} to {high:g}"
        raise NoSoundError(f"the sound has {seen}; expected numbers from -1 to 1")


def full_scale(x: np.ndarray) -> np.ndarray:
    """Return samples of any type as float32 from -1 to 1."""
    if x.dtype.kind == "f":
        return x.astype(np.float32, copy=False)
    if x.dtype.kind == "u":
        return (x.astype(np.float32) - 128) / 128
    return x.astype(np.float32) / np.float32(2.0 ** (8 * x.itemsize - 1))
