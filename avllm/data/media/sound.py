"""The sound of an interval: every channel decoded, their mean taken, placed by timestamps, resampled."""

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

from avllm.data.media.open import MAX_BYTES, MediaError, OpenMedia, read_packets, rewind, seek, stream_end
from avllm.data.media.resample import resampler

if TYPE_CHECKING:
    from av.audio.frame import AudioFrame
    from torch import Tensor

SEEK_FROM = 20.0  # seconds; before that, packets are read and dropped undecoded, which is exact in every container
PREROLL = 0.5  # seconds decoded before the interval: codecs need the packets before the first that is wanted
MARGIN = 0.05  # seconds kept on both sides for the resampler's filter
JITTER = 0.005  # seconds by which a timestamp may be off (milliseconds in matroska) before it counts as a gap
TAIL_SECONDS = 0.1  # sound that may be missing at the end before a file counts as truncated
MAX_BAD_SHARE = 0.05  # of packets that cannot be decoded; above it the track is called undecodable
MIN_RATE, MAX_RATE = 1_000, 1_000_000  # samples a second of a track
MIXED_AT_ONCE = 32  # decoded frames that are held; more would fall out of the processor's cache
PLANE_TYPES = {"u8": np.uint8, "s16": np.int16, "s32": np.int32, "s64": np.int64, "flt": np.float32, "dbl": np.float64}
# Elementary streams: their timestamps after a seek are estimates.
UNSEEKABLE = {"mp3", "aac", "ac3", "eac3", "amr", "mpeg", "mpegvideo"}


@dataclass
class Placed:
    """Decoded sound with the index of its first sample on the file's clock (sample 0 = second 0).

    Frames wait as they came and are mixed many at a time: one by one that takes as long as decoding them.
    """

    first: int  # samples before this one are dropped
    last: int  # samples from this one on are dropped
    rate: int
    pieces: list[tuple[int, np.ndarray]] = field(default_factory=list)  # mono
    waiting: list[AudioFrame] = field(default_factory=list)  # frames of one kind that follow each other
    waiting_from: int = 0
    expected: int | None = None  # index at which the next frame belongs if nothing is missing

    def add(self, at: int | None, frame: AudioFrame) -> None:
        """Place a frame at ``at``; within the jitter it continues the one before."""
        if self.expected is not None and (at is None or abs(at - self.expected) <= JITTER * self.rate):
            at = self.expected
        at = 0 if at is None else at
        follows, self.expected = at == self.expected, at + frame.samples
        if self.expected <= self.first or at >= self.last:
            return
        alike = follows and bool(self.waiting) and kind_of(frame) == kind_of(self.waiting[-1])
        if not alike or len(self.waiting) == MIXED_AT_ONCE:
            self.mix()
            self.waiting_from = at
        self.waiting.append(frame)

    def mix(self) -> None:
        """Make one mono piece of the frames that wait."""
        if self.waiting:
            at, x = self.waiting_from, mono(self.waiting)
            low, high = max(0, self.first - at), min(len(x), self.last - at)
            self.pieces.append((at + low, x[low:high]))
            self.waiting = []

    @property
    def begin(self) -> int:
        """Index of the first sample that is there."""
        return min(at for at, _ in self.pieces)

    def joined(self, before: int, after: int) -> np.ndarray:
        """All samples between so much silence; a hole inside the track is silence, as a player plays it."""
        first, last = self.begin, max(at + len(x) for at, x in self.pieces)
        whole = np.zeros(before + last - first + after, np.float32)
        for at, x in self.pieces:
            whole[before + at - first : before + at - first + len(x)] = x
        return whole


def read_sound(media: OpenMedia, first: float, last: float, rates: Sequence[int]) -> list[tuple[Tensor, float]]:
    """Read the sound of the seconds ``first`` to ``last`` of the file, once, at each of some rates.

    The samples are those that a resampling of the whole file would give: the grid starts at second 0 of the file. In
    Matroska and FLV, whose timestamps are whole milliseconds, what is sought beyond ``SEEK_FROM`` may stand off by one.

    Returns:
        for each rate float32 ``(S,)`` at so many Hz and the second of the file at which it starts (later than
        ``first`` when the track starts late; the track is never padded); nothing when the track has no sample in
        the interval.

    Raises:
        MediaError: undecodable, truncated, timeout.
    """
    placed = _decode_interval(media, first, last)
    if placed is None or not placed.pieces:
        return []
    read = [_resample(placed, first, last, rate) for rate in rates]
    return [sound for sound in read if sound is not None]


def _resample(placed: Placed, first: float, last: float, rate: int) -> tuple[Tensor, float] | None:
    """Give decoded sound another rate; None where no sample of the interval is left."""
    ratio = Fraction(placed.rate, rate).limit_denominator(1000)  # exact for all usual rates; within 1e-6 for odd ones
    convert, start = resampler(ratio), placed.begin
    pad = start % ratio.numerator  # begin on a sample that both grids share; what is padded is cut off again below
    x = placed.joined(convert.before + pad, convert.after)
    end = start + len(x) - convert.before - pad - convert.after
    y = convert(torch.from_numpy(x))
    origin = (start - pad) // ratio.numerator * ratio.denominator  # index of y[0] at the new rate
    low = max(math.ceil(first * rate - 1e-6), math.ceil(start / ratio))
    high = min(math.ceil(last * rate - 1e-6), math.ceil(end / ratio))
    if high <= low:
        return None
    return y[low - origin : high - origin].clone(), low / rate


def _decode_interval(media: OpenMedia, first: float, last: float) -> Placed | None:
    placed: Placed | None = None
    for frame in _frames(media, first, last):
        if placed is None:
            rate, base = frame.sample_rate, frame.time_base  # asked once: a frame makes it anew
            check_rate(media.path, rate)
            placed = Placed(math.floor((first - MARGIN) * rate), math.ceil((last + MARGIN) * rate), rate)
            if (placed.last - placed.first) * 4 > MAX_BYTES:
                raise MediaError(
                    media.path, "absurd_header", f"{last - first:.0f} s of sound at {rate} Hz are too much"
                )
        if frame.sample_rate != placed.rate:
            seen = f"{frame.sample_rate} Hz after {placed.rate} Hz"
            raise MediaError(media.path, "undecodable", f"the sampling rate changes within the track: {seen}")
        placed.add(None if frame.pts is None else round(media.second(frame.pts, base) * placed.rate), frame)
    if placed is not None:
        placed.mix()
        _check_tail(media, placed, last)
    return placed


def check_rate(path: str | Path, rate: int) -> None:
    """A header may declare one hertz or a thousand million: resampling that would take all memory.

    Raises:
        MediaError: absurd_header.
    """
    if not MIN_RATE <= rate <= MAX_RATE:
        seen = f"the header declares {rate} samples a second; expected {MIN_RATE} to {MAX_RATE}"
        raise MediaError(path, "absurd_header", seen)


def kind_of(frame: AudioFrame) -> tuple[str, int]:
    """Sample format and number of channels."""
    return frame.format.name, frame.layout.nb_channels


def mono(frames: list[AudioFrame]) -> np.ndarray:
    """The mean of all channels of frames of one kind, one behind the other: float32 ``(samples,)``, full scale = 1.

    (PyAV 18.1's ``to_ndarray`` crashes from eight planes on, which it counts past their end.)
    """
    form, count = frames[0].format, frames[0].layout.nb_channels
    dtype, width = PLANE_TYPES[form.packed.name], 1 if form.is_planar else count
    sizes = [frame.samples * width * np.dtype(dtype).itemsize for frame in frames]
    planes = zip(*(frame.planes[: count // width] for frame in frames), strict=True)
    joined = (b"".join([memoryview(p)[:n] for p, n in zip(plane, sizes, strict=True)]) for plane in planes)
    channels = [c for x in joined for c in full_scale(np.frombuffer(x, dtype)).reshape(-1, width).T]
    if count == 1:
        return channels[0]
    total = channels[0] + channels[1]
    for more in channels[2:]:
        total += more
    total /= np.float32(count)
    return total


def full_scale(x: np.ndarray) -> np.ndarray:
    """Samples of any type as float32 of -1 to 1."""
    if x.dtype.kind == "f":
        return x.astype(np.float32, copy=False)
    if x.dtype.kind == "u":
        return (x.astype(np.float32) - 128) / 128
    return x.astype(np.float32) / np.float32(2.0 ** (8 * x.itemsize - 1))


def _frames(media: OpenMedia, first: float, last: float) -> Iterator[AudioFrame]:
    """Decoded frames from a little before ``first`` to a little after ``last``."""
    assert media.audio is not None
    decoder, seen, bad = media.audio.codec_context, 0, 0
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
        raise MediaError(media.path, "undecodable", f"{bad} of {seen} sound packets cannot be decoded")


def _packets(media: OpenMedia, first: float, last: float) -> Iterator[av.Packet]:
    assert media.audio is not None
    stream = media.audio
    earliest, latest = media.place(first - PREROLL, stream), media.place(last + MARGIN, stream)
    if first > SEEK_FROM and media.container.format.name not in UNSEEKABLE:
        seek(media, stream, first - PREROLL)
    else:
        rewind(media, stream)
    for packet in read_packets(media, stream):
        if packet.pts is not None and packet.pts > latest:
            return
        if packet.pts is None or packet.pts >= earliest:
            yield packet


def _check_tail(media: OpenMedia, placed: Placed, last: float) -> None:
    """Raise ``truncated`` when the sound ends well before both the interval and the track should."""
    assert media.audio is not None
    expected = stream_end(media, media.audio)
    if expected is None or placed.expected is None:
        return
    end, expected = placed.expected / placed.rate, min(expected, last)
    if expected - end > TAIL_SECONDS:
        raise MediaError(media.path, "truncated", f"the sound ends at {end:.3f} s; expected {expected:.3f} s")
