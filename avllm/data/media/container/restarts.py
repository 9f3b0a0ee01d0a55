"""Find where the timestamps of a file begin again, and make them rise across these places.

Recordings that were joined byte by byte (``cat a.ts b.ts``), and recorders that were interrupted,
give files in which time goes back. A player plays one stretch after the other; so do we.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass, field

from av.packet import Packet

# Containers without an index, whose parts can be joined byte by byte: all packets are looked at
# before the first is decoded. In others, a step back is noticed when it is read.
JOINABLE = {"mpegts", "mpeg"}
STEP_BACK = 0.1  # seconds by which decoding times go back where they begin again


@dataclass(frozen=True)
class Stretch:
    """Hold the byte from which on packets are shifted, and by how many seconds."""

    position: int
    shift: float


@dataclass
class RisingClock:
    """Shift the packets of each stretch to the end of the stretch before.

    Attributes:
        stretches: by position; the first is not shifted.
        ends: by index of a stream, the second after its last packet, shifted.
    """

    stretches: list[Stretch]
    ends: dict[int, float]
    _positions: dict[int, int] = field(default_factory=dict)

    def begin(self) -> None:
        """Forget where the reading is; it goes on from the beginning of the file."""
        self._positions.clear()

    def put_right(self, packet: Packet) -> None:
        """Shift the times of the next packet of its stream."""
        index = packet.stream_index
        position = self._positions.get(index, 0) if packet.pos is None else packet.pos
        self._positions[index] = position
        starts = [stretch.position for stretch in self.stretches]
        shift = self.stretches[bisect.bisect_right(starts, position) - 1].shift
        base = packet.time_base
        if not shift or base is None:
            return
        ticks = round(shift / base)
        if packet.pts is not None:
            packet.pts += ticks
        if packet.dts is not None:
            packet.dts += ticks


@dataclass
class _Track:
    """Follow the decoding times of one stream.

    Attributes:
        position: byte of its last packet.
        last: second of its last packet in this stretch, unshifted; None before the first.
        back: its last packet, if that stepped back; the next one says whether time began again
            there or this one packet is wrong.
    """

    position: int = 0
    last: float | None = None
    back: _StepBack | None = None


@dataclass(frozen=True)
class _StepBack:
    position: int
    decoded: float
    shown: float


class _Scan:
    """Follow all streams of a file to find where their times begin again."""

    def __init__(self) -> None:
        self.stretches = [Stretch(0, 0.0)]
        self.ends: dict[int, float] = {}
        self.tracks: dict[int, _Track] = {}

    def add(self, packet: Packet) -> None:
        """Take in the next packet of the file."""
        stamp = packet.pts if packet.dts is None else packet.dts
        base = packet.time_base
        if stamp is None or base is None:
            return
        track = self.tracks.setdefault(packet.stream_index, _Track())
        track.position = track.position if packet.pos is None else packet.pos
        decoded = float(stamp * base)
        shown = decoded if packet.pts is None else float(packet.pts * base)
        if track.position < self.stretches[-1].position:  # of the stretch before, delivered late
            self._extend(packet, shown, self.stretches[-2].shift)
            return
        self._follow(track, _StepBack(track.position, decoded, shown))
        if track.back is None:
            self._extend(packet, shown, self.stretches[-1].shift)

    def _follow(self, track: _Track, now: _StepBack) -> None:
        last = track.last
        if track.back is not None and last is not None and now.decoded < last - STEP_BACK:
            self._begin_again(track.back)
            track.last = now.decoded
        elif track.back is None and last is not None and now.decoded < last - STEP_BACK:
            track.back = now
        else:
            track.back = None
            track.last = now.decoded

    def _begin_again(self, step: _StepBack) -> None:
        steps = [track.back for track in self.tracks.values() if track.back is not None]
        position = min(step.position for step in steps)
        begin = min(step.shown for step in steps)
        shift = max(self.ends.values(), default=0.0) - begin
        self.stretches.append(Stretch(position, shift))
        for track in self.tracks.values():
            track.last = None
            track.back = None

    def _extend(self, packet: Packet, shown: float, shift: float) -> None:
        duration = float((packet.duration or 0) * (packet.time_base or 0))
        end = shown + shift + duration
        index = packet.stream_index
        self.ends[index] = max(self.ends.get(index, end), end)


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
