"""Find where the timestamps of a file begin again or jump ahead, and join them at these places.

Recordings that were joined byte by byte (``cat a.ts b.ts``), and recorders that were interrupted,
give files in which time goes back, or far ahead where the second was recorded later. A player plays
one stretch after the other; so do we. All streams are shifted alike, so that sight and sound stay
together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from av.packet import Packet

# Containers without an index, whose parts can be joined byte by byte: all packets are looked at
# before the first is decoded. In others, a step back is noticed when it is read.
JOINABLE = {"mpegts", "mpeg", "ogg"}
STEP_BACK = 0.1  # seconds by which decoding times go back where they begin again
JUMP_AHEAD = 10.0  # seconds without a packet of any stream; ffmpeg's `-dts_delta_threshold`


@dataclass
class ClockStretch:
    """Hold packets whose times rise.

    Attributes:
        position: byte of the file at which it begins.
        shift: seconds that are added to its times.
        first: by index of a stream, the number of its first packet in the stretch.
    """

    position: int
    shift: float
    first: dict[int, int]


@dataclass
class RisingClock:
    """Shift the packets of each stretch to the end of the stretch before.

    Attributes:
        stretches: in the order of the file; the first is not shifted.
        ends: by index of a stream, the second after its last packet, shifted.
    """

    stretches: list[ClockStretch]
    ends: dict[int, float]
    _seen: Counter[int] = field(default_factory=Counter)

    def begin(self) -> None:
        """Forget where the reading is; it goes on from the beginning of the file."""
        self._seen.clear()

    def put_right(self, packet: Packet) -> None:
        """Shift the times of the next packet of its stream."""
        index = packet.stream_index
        number = self._seen[index]
        self._seen[index] += 1
        shift = 0.0
        for stretch in self.stretches:
            if index in stretch.first and stretch.first[index] <= number:
                shift = stretch.shift
        base = packet.time_base
        if base is None:
            return
        if is_guessed(packet):
            packet.pts = packet.dts
        ticks = round(shift / base)
        if packet.pts is not None:
            packet.pts += ticks
        if packet.dts is not None:
            packet.dts += ticks


def is_guessed(packet: Packet) -> bool:
    """Return whether a packet before a joint has the display time of the packet after it.

    MPEG program streams give every few pictures a time, and libav guesses the others from the next.
    """
    if packet.pts is None or packet.dts is None or packet.time_base is None:
        return False
    return abs(packet.pts - packet.dts) * packet.time_base > JUMP_AHEAD


@dataclass(frozen=True)
class _PacketTime:
    """Hold number, byte, decoding time and display time of a packet, times in seconds."""

    number: int
    position: int
    decoded: float
    shown: float


@dataclass
class _Track:
    """Follow the decoding times of one stream.

    Attributes:
        count: of packets so far.
        position: byte of its last packet.
        last: second of its last packet in this stretch, unshifted; None before the first.
        step: its last packet, if that stepped back or jumped ahead; the next one says whether time
            began again there or this one packet is wrong.
    """

    count: int = 0
    position: int = 0
    last: float | None = None
    step: _PacketTime | None = None


class _Scan:
    """Follow all streams of a file to find where their times begin again."""

    def __init__(self) -> None:
        self.stretches = [ClockStretch(0, 0.0, {})]
        self.ends: dict[int, float] = {}
        self.tracks: dict[int, _Track] = {}

    def add(self, packet: Packet) -> None:
        """Take in the next packet of the file."""
        track = self.tracks.setdefault(packet.stream_index, _Track())
        number = track.count
        track.count += 1
        track.position = track.position if packet.pos is None else packet.pos
        stamp = packet.pts if packet.dts is None else packet.dts
        base = packet.time_base
        if stamp is None or base is None:
            return
        decoded = float(stamp * base)
        shown = decoded
        if packet.pts is not None and not is_guessed(packet):
            shown = float(packet.pts * base)
        now = _PacketTime(number, track.position, decoded, shown)
        stretch = self.stretches[-1]
        index = packet.stream_index
        if index not in stretch.first and now.position < stretch.position:
            stretch = self.stretches[-2]  # the stretch before still delivers this stream
        else:
            stretch.first.setdefault(index, number)
            self._follow(track, now)
            stretch = self.stretches[-1]  # which may have begun with this packet
        if track.step is None:
            duration = float((packet.duration or 0) * base)
            end = shown + stretch.shift + duration
            self.ends[index] = max(self.ends.get(index, end), end)

    def _follow(self, track: _Track, now: _PacketTime) -> None:
        is_step = self._is_step(track, now)
        before = track.step
        if is_step and before is not None and abs(now.decoded - before.decoded) <= JUMP_AHEAD:
            self._begin_again()
            track.last = now.decoded
        elif is_step and before is None:
            track.step = now
        else:
            track.step = None
            track.last = now.decoded

    def _is_step(self, track: _Track, now: _PacketTime) -> bool:
        """Return whether a packet steps back in its stream, or is far ahead of all streams."""
        if track.last is not None and now.decoded < track.last - STEP_BACK:
            return True
        latest = [other.last for other in self.tracks.values() if other.last is not None]
        return bool(latest) and now.decoded > max(latest) + JUMP_AHEAD

    def _begin_again(self) -> None:
        first: dict[int, int] = {}
        steps: list[_PacketTime] = []
        for index, track in self.tracks.items():
            if track.step is not None:
                steps.append(track.step)
                first[index] = track.step.number
            track.last = None
            track.step = None
        shift = max(self.ends.values(), default=0.0) - min(step.shown for step in steps)
        position = min(step.position for step in steps)
        self.stretches.append(ClockStretch(position, shift, first))


def find_restarts(packets: Iterable[Packet]) -> RisingClock | None:
    """Return a clock that rises through all packets of a file; None where theirs does.

    Args:
        packets: of all streams, from the beginning of the file.
    """
    scan = _Scan()
    for packet in packets:
        scan.add(packet)
    if len(scan.stretches) == 1:
        return None
    return RisingClock(scan.stretches, scan.ends)
