"""Read the packets around some moments of a video, undecoded, with the times of their frames."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from avllm.data.media.container.length import stream_end
from avllm.data.media.errors import MediaError
from avllm.data.media.open import OpenMedia, read_packets, rewind, seek

if TYPE_CHECKING:
    from av.packet import Packet

SEEK_GAP = 20.0  # seconds; reading on over a shorter gap costs less than seeking
MAX_WINDOW = 60.0  # seconds of packets that are held at a time
UNTIMED_DELAY = 1.0  # seconds read beyond the last moment where packets have no display times
TICK = 1e-6  # seconds; a moment this close before a frame belongs to it
TAIL_FRAMES = 2.5  # frames that may be missing at the end before a file counts as truncated


@dataclass
class Window:
    """Hold the packets of a stretch of a video, in decoding order, from a key frame on.

    Attributes:
        packets: with their data.
        times: second of the file at which each is displayed; None where the container has no time.
        complete: False when the file ended before the stretch did.
    """

    packets: list[Packet]
    times: list[float | None]
    complete: bool

    @cached_property
    def displayed(self) -> list[tuple[float, int]]:
        """Return sorted (second, packet index) of the packets that appear on the screen.

        It is read when the window is complete.
        """
        displayed = []
        for index, (time, packet) in enumerate(zip(self.times, self.packets, strict=True)):
            if time is not None and not packet.is_discard and not packet.is_corrupt:
                displayed.append((time, index))
        return sorted(displayed)

    @property
    def cut(self) -> bool:
        """Return whether an edit list hides the first packet: the file was cut without encoding."""
        return any(packet.is_discard for packet in self.packets[:1])

    @property
    def closed(self) -> bool:
        """Return whether no frame refers to a picture before the key frame that precedes it."""
        key_time = -math.inf
        for packet, time in zip(self.packets, self.times, strict=True):
            if packet.is_keyframe:
                key_time = -math.inf if time is None else time
            elif time is not None and time < key_time:
                return False
        return True

    @property
    def timed(self) -> bool:
        """Return whether every packet has a time."""
        return all(time is not None for time in self.times)


def window_moments(moments: list[float]) -> list[list[float]]:
    """Split ascending moments into groups that are read in one go."""
    groups: list[list[float]] = []
    for moment in moments:
        if groups and _belongs_to(groups[-1], moment):
            groups[-1].append(moment)
        else:
            groups.append([moment])
    return groups


def _belongs_to(group: list[float], moment: float) -> bool:
    return moment - group[-1] <= SEEK_GAP and moment - group[0] <= MAX_WINDOW


def read_window(media: OpenMedia, first: float, last: float) -> Window:
    """Read the packets from the key frame before second ``first`` to second ``last``."""
    if media.video is not None and is_untimed(media):
        return _read_from(media, 0.0, last + UNTIMED_DELAY)
    back = 0.0
    while True:
        seek_to = first - back
        window = _read_from(media, seek_to, last)
        if seek_to <= 0 or _starts_before(window, first):
            return window
        # The key frame that the container gave is displayed after `first`: look further back.
        back = 2 * back + 2.0


def _starts_before(window: Window, first: float) -> bool:
    """Return whether the first key frame is displayed at second ``first`` or earlier."""
    if not window.timed:
        return False
    for time, index in window.displayed:
        if window.packets[index].is_keyframe:
            return time <= first + TICK
    return False


def is_untimed(media: OpenMedia) -> bool:
    """Return whether the container has the decoding order alone and frames are reordered.

    AVI is such a container; libav's guess at the times is wrong there.
    """
    assert media.video is not None
    return media.container.format.name == "avi" and media.video.codec_context.has_b_frames


def _read_from(media: OpenMedia, seek_to: float, last: float) -> Window:
    assert media.video is not None
    if seek_to <= 0:
        rewind(media, media.video)
    else:
        seek(media, media.video, seek_to)
    stream = media.video
    base = stream.time_base  # read once, since each access makes a new object
    untimed = is_untimed(media)
    window = Window([], [], complete=False)
    latest = media.exact_ticks(last + TICK, stream)
    for packet in read_packets(media, stream):
        late = packet.dts is not None and packet.dts > latest
        # A track that starts after `last` gives its first frame nevertheless.
        if late and window.packets:
            # dts never exceeds pts: no later packet is displayed by `last`.
            window.complete = True
            break
        unknown = packet.pts is None or untimed
        time = None if unknown else media.second(packet.pts or 0, base)
        if packet.is_keyframe and media.clock is not None and time is not None and time <= seek_to:
            window = Window([], [], complete=False)  # read from the beginning, in place of seeking
        if window.packets or packet.is_keyframe:
            window.packets.append(packet)
            window.times.append(time)
    return window


def check_tail(media: OpenMedia, window: Window, end: float) -> None:
    """Raise ``truncated`` when the picture ends well before both ``end`` and the stream's end."""
    assert media.video is not None
    stream_ends_at = stream_end(media, media.video)
    displayed = window.displayed
    if not window.packets:
        raise MediaError(media.path, "truncated", f"no video packet up to {end:.3f} s")
    if stream_ends_at is None or not displayed:
        return
    last_time, last_index = displayed[-1]
    gap = longest_gap([time for time, _ in displayed], media)
    duration = window.packets[last_index].duration or 0
    picture_end = last_time + media.second(duration, media.video.time_base) + media.origin
    expected = min(stream_ends_at, end)
    if expected - picture_end > TAIL_FRAMES * gap:
        seen = f"the picture ends at {picture_end:.3f} s; expected {expected:.3f} s"
        raise MediaError(media.path, "truncated", seen)


def longest_gap(seconds: list[float], media: OpenMedia) -> float:
    """Return the longest time between frames, the length of a frame where the rate varies."""
    assert media.video is not None
    usual = 1.0 / float(media.video.average_rate or 25)
    return max([usual, *(later - earlier for earlier, later in itertools.pairwise(seconds))])
