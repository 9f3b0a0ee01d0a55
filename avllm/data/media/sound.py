"""Read the sound of an interval: decode all channels, take their mean, place it, resample."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np
import torch

from avllm.data.media.open import (
    MAX_BYTES,
    MediaError,
    OpenMedia,
    read_packets,
    rewind,
    seek,
    stream_end,
)
from avllm.data.media.resample import resampler

if TYPE_CHECKING:
    from av.audio.frame import AudioFrame
    from torch import Tensor

# Seconds of the file from which on the container seeks. Before, packets are read and dropped
# undecoded, which is exact in every container.
SEEK_FROM = 20.0
PREROLL = 0.5  # seconds decoded before the interval: codecs need the packets before its first
MARGIN = 0.05  # seconds on both sides for the resampler's filter
JITTER = 0.005  # seconds; a timestamp that is off by less (rounded in matroska) makes no gap
TAIL_SECONDS = 0.1  # sound that may be missing at the end before a file counts as truncated
MAX_BAD_SHARE = 0.05  # of packets that cannot be decoded; above it the track is undecodable
MIN_RATE = 1_000  # samples a second of a track
MAX_RATE = 1_000_000
MIXED_AT_ONCE = 32  # decoded frames that are held; more do not fit into the processor's cache
PLANE_TYPES = {
    "u8": np.uint8,
    "s16": np.int16,
    "s32": np.int32,
    "s64": np.int64,
    "flt": np.float32,
    "dbl": np.float64,
}
# Elementary streams: their timestamps after a seek are estimates.
UNSEEKABLE = {"mp3", "aac", "ac3", "eac3", "amr", "mpeg", "mpegvideo"}


@dataclass(frozen=True)
class SoundPiece:
    """Hold mono samples ``(S,)`` and the index of the first on the file's clock."""

    first: int
    samples: np.ndarray

    @property
    def end(self) -> int:
        """Return the index after the last sample."""
        return self.first + len(self.samples)


@dataclass
class PlacedSound:
    """Place decoded sound on the file's clock, where sample 0 is second 0.

    Decoded frames wait and are mixed many at a time: one by one, mixing takes as long as decoding.

    Attributes:
        first: samples before this index are dropped.
        last: samples from this index on are dropped.
        rate: samples a second.
        pieces: mixed sound.
        waiting: frames of one kind that follow each other, not mixed yet.
        waiting_from: index of their first sample.
        expected: index at which the next frame begins if nothing is missing.
    """

    first: int
    last: int
    rate: int
    pieces: list[SoundPiece] = field(default_factory=list)
    waiting: list[AudioFrame] = field(default_factory=list)
    waiting_from: int = 0
    expected: int | None = None

    def add(self, index: int | None, frame: AudioFrame) -> None:
        """Place a frame at ``index``; within the jitter it continues the frame before."""
        expected = self.expected
        jitter = JITTER * self.rate
        if expected is not None and (index is None or abs(index - expected) <= jitter):
            index = expected
        index = 0 if index is None else index
        follows = index == expected
        self.expected = index + frame.samples
        if self.expected <= self.first or index >= self.last:
            return
        alike = follows and bool(self.waiting) and kind_of(frame) == kind_of(self.waiting[-1])
        if not alike or len(self.waiting) == MIXED_AT_ONCE:
            self.mix()
            self.waiting_from = index
        self.waiting.append(frame)

    def mix(self) -> None:
        """Make one mono piece of the frames that wait."""
        if not self.waiting:
            return
        samples = mono(self.waiting)
        low = max(0, self.first - self.waiting_from)
        high = min(len(samples), self.last - self.waiting_from)
        self.pieces.append(SoundPiece(self.waiting_from + low, samples[low:high]))
        self.waiting = []

    @property
    def begin(self) -> int:
        """Return the index of the first sample of all pieces."""
        return min(piece.first for piece in self.pieces)

    def joined(self, before: int, after: int) -> np.ndarray:
        """Return all samples, with silence before, after and in holes, as a player plays it.

        Args:
            before: samples of silence before the first.
            after: samples of silence after the last.
        """
        first = self.begin
        end = max(piece.end for piece in self.pieces)
        whole = np.zeros(before + end - first + after, np.float32)
        for piece in self.pieces:
            offset = before + piece.first - first
            whole[offset : offset + len(piece.samples)] = piece.samples
        return whole


def read_sound(
    media: OpenMedia,
    first: float,
    last: float,
    rates: Sequence[int],
) -> list[tuple[Tensor, float]]:
    """Read the sound of the seconds ``first`` to ``last`` of the file, once, at each of some rates.

    The samples are those that a resampling of the whole file would give: the grid starts at second
    0 of the file. In Matroska and FLV, whose timestamps are whole milliseconds, samples beyond
    ``SEEK_FROM`` may be off by one.

    Returns:
        for each rate float32 ``(S,)`` at so many Hz and the second of the file at which it starts
        (later than ``first`` when the track starts late; the track is never padded); nothing when
        the track has no sample in the interval.

    Raises:
        MediaError: undecodable, truncated, timeout.
    """
    placed = _decode_interval(media, first, last)
    if placed is None or not placed.pieces:
        return []
    sounds = [_resample(placed, first, last, rate) for rate in rates]
    return [sound for sound in sounds if sound is not None]


def _resample(
    placed: PlacedSound,
    first: float,
    last: float,
    rate: int,
) -> tuple[Tensor, float] | None:
    """Resample decoded sound; return None when no sample of the interval is left."""
    # Old samples to a new one: exact for all usual rates, within 1e-6 for odd ones.
    ratio = Fraction(placed.rate, rate).limit_denominator(1000)
    resample = resampler(ratio)
    start = placed.begin
    # Begin on a sample that both grids share; what is padded is cut off again below.
    pad = start % ratio.numerator
    padded = placed.joined(resample.before + pad, resample.after)
    end = start + len(padded) - resample.before - pad - resample.after
    resampled = resample(torch.from_numpy(padded))
    origin = (start - pad) // ratio.numerator * ratio.denominator  # index of its first sample
    low = max(math.ceil(first * rate - 1e-6), math.ceil(start / ratio))
    high = min(math.ceil(last * rate - 1e-6), math.ceil(end / ratio))
    if high <= low:
        return None
    return resampled[low - origin : high - origin].clone(), low / rate


def _decode_interval(media: OpenMedia, first: float, last: float) -> PlacedSound | None:
    """Decode and place the sound of an interval; return None when there is no frame."""
    placed: PlacedSound | None = None
    for frame in _frames(media, first, last):
        if placed is None:
            time_base = frame.time_base  # read once, since each access makes a new object
            placed = _empty_sound(media, first, last, frame.sample_rate)
        if frame.sample_rate != placed.rate:
            seen = f"{frame.sample_rate} Hz after {placed.rate} Hz"
            detail = f"the sampling rate changes within the track: {seen}"
            raise MediaError(media.path, "undecodable", detail)
        if frame.pts is None:
            placed.add(None, frame)
        else:
            placed.add(round(media.second(frame.pts, time_base) * placed.rate), frame)
    if placed is not None:
        placed.mix()
        _check_tail(media, placed, last)
    return placed


def _empty_sound(media: OpenMedia, first: float, last: float, rate: int) -> PlacedSound:
    """Return a place for the sound of an interval and its margins.

    Raises:
        MediaError: absurd_header, when the rate is, or the sound is too large.
    """
    check_rate(media.path, rate)
    first_sample = math.floor((first - MARGIN) * rate)
    last_sample = math.ceil((last + MARGIN) * rate)
    if (last_sample - first_sample) * 4 > MAX_BYTES:
        detail = f"{last - first:.0f} s of sound at {rate} Hz are too much"
        raise MediaError(media.path, "absurd_header", detail)
    return PlacedSound(first_sample, last_sample, rate)


def check_rate(path: str | Path, rate: int) -> None:
    """Refuse absurd sampling rates, whose resampling would take all memory.

    Raises:
        MediaError: absurd_header.
    """
    if not MIN_RATE <= rate <= MAX_RATE:
        seen = f"the header declares {rate} samples a second; expected {MIN_RATE} to {MAX_RATE}"
        raise MediaError(path, "absurd_header", seen)


def kind_of(frame: AudioFrame) -> tuple[str, int]:
    """Return sample format and number of channels."""
    return frame.format.name, frame.layout.nb_channels


def mono(frames: list[AudioFrame]) -> np.ndarray:
    """Return the mean of all channels of consecutive frames of one kind.

    Channels lie in a plane each, or interleaved in one plane. PyAV's ``to_ndarray`` is not used,
    since in 18.1 it reads past the end of frames with eight planes or more.

    Returns:
        float32 ``(samples,)``, full scale 1.
    """
    sample_format = frames[0].format
    count = frames[0].layout.nb_channels
    interleaved = 1 if sample_format.is_planar else count  # channels in a plane
    dtype = PLANE_TYPES[sample_format.packed.name]
    sizes = [frame.samples * interleaved * np.dtype(dtype).itemsize for frame in frames]
    channels: list[np.ndarray] = []
    for plane in range(count // interleaved):
        content = b"".join(
            [_plane(frame, plane, size) for frame, size in zip(frames, sizes, strict=True)],
        )
        samples = full_scale(np.frombuffer(content, dtype))
        channels.extend(samples.reshape(-1, interleaved).T)
    if count == 1:
        return channels[0]
    total = channels[0] + channels[1]
    for channel in channels[2:]:
        total += channel
    total /= np.float32(count)
    return total


def _plane(frame: AudioFrame, plane: int, size: int) -> memoryview:
    """Return the samples of one plane, without the padding at its end."""
    return memoryview(frame.planes[plane])[:size]


def full_scale(x: np.ndarray) -> np.ndarray:
    """Return samples of any type as float32 from -1 to 1."""
    if x.dtype.kind == "f":
        return x.astype(np.float32, copy=False)
    if x.dtype.kind == "u":
        return (x.astype(np.float32) - 128) / 128
    return x.astype(np.float32) / np.float32(2.0 ** (8 * x.itemsize - 1))


def _frames(media: OpenMedia, first: float, last: float) -> Iterator[AudioFrame]:
    """Yield decoded frames from a little before ``first`` to a little after ``last``."""
    assert media.audio is not None
    decoder = media.audio.codec_context
    seen = 0
    bad = 0
    decoder.flush_buffers()
    for packet in _packets(media, first, last):
        seen += 1
        try:
            yield from decoder.decode(packet)
        except av.error.InvalidDataError:
            bad += 1
    yield from decoder.decode(None)
    decoder.flush_buffers()
    if bad > MAX_BAD_SHARE * seen:
        detail = f"{bad} of {seen} sound packets cannot be decoded"
        raise MediaError(media.path, "undecodable", detail)


def _packets(media: OpenMedia, first: float, last: float) -> Iterator[av.Packet]:
    assert media.audio is not None
    stream = media.audio
    earliest = media.exact_ticks(first - PREROLL, stream)
    latest = media.exact_ticks(last + MARGIN, stream)
    if first > SEEK_FROM and media.container.format.name not in UNSEEKABLE:
        seek(media, stream, first - PREROLL)
    else:
        rewind(media, stream)
    for packet in read_packets(media, stream):
        if packet.pts is not None and packet.pts > latest:
            return
        if packet.pts is None or packet.pts >= earliest:
            yield packet


def _check_tail(media: OpenMedia, placed: PlacedSound, last: float) -> None:
    """Raise ``truncated`` when the sound ends well before both the interval and the track."""
    assert media.audio is not None
    track_end = stream_end(media, media.audio)
    if track_end is None or placed.expected is None:
        return
    end = placed.expected / placed.rate
    expected = min(track_end, last)
    if expected - end > TAIL_SECONDS:
        seen = f"the sound ends at {end:.3f} s; expected {expected:.3f} s"
        raise MediaError(media.path, "truncated", seen)
