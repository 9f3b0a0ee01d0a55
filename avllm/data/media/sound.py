"""Read the sound of an interval: decode all channels, mix them, place the mix, resample it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING

import av
import numpy as np
import torch

from avllm.data.media.clip import MAX_BYTES, Note
from avllm.data.media.container.length import stream_end
from avllm.data.media.container.tracks import check_rate
from avllm.data.media.errors import MediaError
from avllm.data.media.mixing import (
    ChannelPower,
    NoSoundError,
    channels_of,
    kind_of,
    mean_of,
)
from avllm.data.media.open import OpenMedia, read_packets, rewind, seek
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
MOST_SILENCE = 512 * 2**20  # bytes of silence in holes that are filled, or as many as the sound
MIXED_AT_ONCE = 32  # decoded frames that are held; more do not fit into the processor's cache
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
        waiting_kind: sample format and number of channels of theirs.
        expected: index at which the next frame begins if nothing is missing.
        channel: the channel that is taken; None = the mean of all.
        power: of all channels and of their mean.
    """

    first: int
    last: int
    rate: int
    pieces: list[SoundPiece] = field(default_factory=list)
    waiting: list[AudioFrame] = field(default_factory=list)
    waiting_from: int = 0
    waiting_kind: tuple[str, int] | None = None
    expected: int | None = None
    channel: int | None = None
    power: ChannelPower = field(default_factory=ChannelPower)

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
        kind = kind_of(frame)
        alike = follows and bool(self.waiting) and kind == self.waiting_kind
        if not alike or len(self.waiting) == MIXED_AT_ONCE:
            self.mix()
            self.waiting_from = index
            self.waiting_kind = kind
        self.waiting.append(frame)

    def mix(self) -> None:
        """Make one mono piece of the frames that wait.

        Raises:
            NoSoundError: their samples are no numbers of sound.
        """
        if not self.waiting:
            return
        low = max(0, self.first - self.waiting_from)
        high = max(low, self.last - self.waiting_from)
        channels = [channel[low:high] for channel in channels_of(self.waiting)]
        samples = mean_of(channels)
        if self.channel is not None and self.channel < len(channels):
            samples = channels[self.channel]
        elif len(channels) > 1:
            self.power.add(channels, samples)
        self.pieces.append(SoundPiece(self.waiting_from + low, samples))
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


@dataclass(frozen=True)
class Resampled:
    """Hold samples ``(S,)`` float32 at one rate, and the second of the file of the first."""

    samples: Tensor
    start: float


@dataclass(frozen=True)
class IntervalSound:
    """Hold the sound of an interval at some rates, and what mixing it needed.

    Attributes:
        at_rates: at each rate that has a sample in the interval.
        notes: for the check.
    """

    at_rates: tuple[Resampled, ...]
    notes: tuple[Note, ...] = ()


def read_sound(
    media: OpenMedia,
    first: float,
    last: float,
    rates: Sequence[int],
) -> IntervalSound:
    """Read the sound of the seconds ``first`` to ``last`` of the file, once, at each of some rates.

    The samples are those that a resampling of the whole file would give: the grid starts at second
    0 of the file. In Matroska and FLV, whose timestamps are whole milliseconds, samples beyond
    ``SEEK_FROM`` may be off by one. It is the mean of all channels, or where they cancel each other
    in this interval, the channel with the most energy.

    Returns:
        for each rate the samples, which start later than ``first`` when the track starts late (the
        track is never padded); no rates when the track has no sample in the interval.

    Raises:
        MediaError: undecodable, truncated, bad_values, absurd_header, timeout.
    """
    try:
        placed = _decode_interval(media, first, last, None)
        channel = None if placed is None else placed.power.channel_alone()
        notes = () if placed is None or channel is None else (placed.power.note(channel),)
        if channel is not None:
            placed = _decode_interval(media, first, last, channel)
    except NoSoundError as error:
        raise MediaError(media.path, "bad_values", str(error)) from error
    if placed is None or not placed.pieces:
        return IntervalSound(())
    _check_holes(media, placed)
    sounds = [_resample(placed, first, last, rate) for rate in rates]
    return IntervalSound(tuple(sound for sound in sounds if sound is not None), notes)


def _check_holes(media: OpenMedia, placed: PlacedSound) -> None:
    """Refuse a track whose timestamps leave more silence than sound, and much of it.

    Raises:
        MediaError: absurd_header.
    """
    samples = sum(len(piece.samples) for piece in placed.pieces)
    silence = max(piece.end for piece in placed.pieces) - placed.begin - samples
    if silence > max(samples, MOST_SILENCE // 4):
        seen = f"{samples / placed.rate:.0f} s of sound with {silence / placed.rate:.0f} s between"
        raise MediaError(media.path, "absurd_header", f"its timestamps place {seen}")


def _resample(
    placed: PlacedSound,
    first: float,
    last: float,
    rate: int,
) -> Resampled | None:
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
    return Resampled(resampled[low - origin : high - origin].clone(), low / rate)


def _decode_interval(
    media: OpenMedia,
    first: float,
    last: float,
    channel: int | None,
) -> PlacedSound | None:
    """Decode and place the sound of an interval; return None when there is no frame.

    Args:
        media: an open file with a sound track.
        first: second of the file.
        last: second of the file.
        channel: the channel that is taken; None = the mean of all.

    Raises:
        MediaError: undecodable, truncated, timeout. NoSoundError: samples are no numbers of sound.
    """
    placed: PlacedSound | None = None
    for frame in _frames(media, first, last):
        if placed is None:
            time_base = frame.time_base  # read once, since each access makes a new object
            placed = _empty_sound(media, first, last, frame.sample_rate)
            placed.channel = channel
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


def _frames(media: OpenMedia, first: float, last: float) -> Iterator[AudioFrame]:
    """Yield decoded frames from a little before ``first`` to a little after ``last``."""
    _go_to(media, first)
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


def _go_to(media: OpenMedia, first: float) -> None:
    """Go to a packet before second ``first``: to the very first one where that is near."""
    assert media.audio is not None
    if first > SEEK_FROM and media.container.format.name not in UNSEEKABLE:
        seek(media, media.audio, first - PREROLL)
    else:
        rewind(media, media.audio)


def _packets(media: OpenMedia, first: float, last: float) -> Iterator[av.Packet]:
    """Yield the packets from the current position on that an interval and its margins need."""
    assert media.audio is not None
    stream = media.audio
    earliest = media.exact_ticks(first - PREROLL, stream)
    latest = media.exact_ticks(last + MARGIN, stream)
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
