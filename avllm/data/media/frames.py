"""Decode the frames displayed at given moments, from no more packets than they depend on.

The packets around the moments are read first, undecoded: their timestamps say which frame is on the
screen at each moment, so variable frame rates and edit lists need no arithmetic on indices. Then
each of these frames is decoded from the key frame before it, without the H.264 frames that no other
frame refers to. Moments that are far apart in a long file are sought one by one.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from avllm.data.media.container.tracks import pixel_aspect
from avllm.data.media.errors import MediaError
from avllm.data.media.open import OpenMedia
from avllm.data.media.pictures.display import (
    FieldFilter,
    colours_of,
    display_matrix,
    is_transparent,
    orient,
)
from avllm.data.media.pictures.tone import is_high_dynamic_range, tone_mapped
from avllm.data.media.window import (
    TAIL_FRAMES,
    TICK,
    Window,
    check_tail,
    is_untimed,
    longest_gap,
    read_window,
    window_moments,
)

if TYPE_CHECKING:
    from av.packet import Packet
    from av.video.frame import VideoFrame

    from avllm.data.media.sampling import Sampling


@dataclass
class Canvas:
    """Hold the output ``(T, H, W, 3)`` uint8, allocated when the first frame shows its true size.

    In memory it is channel by channel, as the decoder gives it and as encoders take it: packing
    pixels takes a third of the time of scaling, and encoders would have to unpack them again.

    Attributes:
        path: of the file, for errors.
        steps: T.
        sampling: gives the size.
        aspect: how many times a stored pixel is as wide as high.
        planes: ``(T, 3, H, W)``; None before the first frame.
        width: of the picture before rotation, in square pixels.
        height: of the picture before rotation.
        turn: degrees by which the last frame is turned.
        matrix: display matrix of the frames since then.
        reformatter: is held, since setting one up takes as long as a frame.
        upper_field: takes one field out of interlaced frames.
    """

    path: str
    steps: int
    sampling: Sampling
    aspect: float = 1.0
    planes: np.ndarray | None = None
    width: int = 0
    height: int = 0
    turn: int = 0
    matrix: np.ndarray | None = None
    reformatter: VideoReformatter = field(default_factory=VideoReformatter)
    upper_field: FieldFilter = field(default_factory=FieldFilter)

    def put(self, frame: VideoFrame, steps: list[int]) -> None:
        """Resize, rotate and store one frame at each of ``steps``."""
        if self.planes is None:
            width = max(1, round(frame.width * self.aspect))
            self.width, self.height = self.sampling.size(width, frame.height)
        turn = frame.rotation
        if self.planes is None or turn != self.turn:
            # Not for each frame: PyAV's side data and their frame hold each other, so that frames
            # would stay in memory until the garbage is collected.
            self.matrix = display_matrix(frame)
            self.turn = turn
        colours = [orient(colour, self.matrix) for colour in self._colours(frame)]
        if self.planes is None:
            self.planes = np.empty((self.steps, 3, *colours[0].shape), np.uint8)
        height, width = self.planes.shape[2:]
        if colours[0].shape != (height, width):
            seen = f"{colours[0].shape[1]}x{colours[0].shape[0]} after {width}x{height}"
            detail = f"the picture turns within the clip: {seen}"
            raise MediaError(self.path, "undecodable", detail)
        for step in steps:
            for channel, colour in enumerate(colours):
                self.planes[step, channel] = colour

    def _colours(self, frame: VideoFrame) -> list[np.ndarray]:
        """Return red, green and blue ``(H, W)`` of the frame, resized."""
        if frame.interlaced_frame:
            frame = self.upper_field(frame)
        if is_high_dynamic_range(frame):
            deep = self._resized(frame, "gbrp16le")
            return tone_mapped(deep, int(frame.color_trc))
        # To planes: libswscale scales to packed RGB half as fast, with half the chroma, and darker.
        pixels = "gbrp"
        if is_transparent(frame.format.name):
            pixels = "gbrap"
        elif (self.width, self.height) == (frame.width, frame.height):
            pixels = "rgb24"
        return colours_of(self._resized(frame, pixels))

    def _resized(self, frame: VideoFrame, pixels: str) -> VideoFrame:
        return self.reformatter.reformat(
            frame,
            self.width,
            self.height,
            pixels,
            interpolation="BILINEAR",
            threads=1,  # starting several for every frame takes longer than the work
        )


@dataclass
class Target:
    """Hold a moment (second of the file) and the step of the output that shows it."""

    moment: float
    step: int


def read_frames(
    media: OpenMedia,
    moments: list[float],
    end: float,
    sampling: Sampling,
) -> np.ndarray:
    """Return the frame on the screen at each moment.

    Args:
        media: an open file with a video track.
        moments: seconds of the file, ascending.
        end: second of the file up to which there must be picture (``truncated`` otherwise).
        sampling: gives the size.

    Returns:
        uint8 RGB ``(T, H, W, 3)``. Moments before the first frame show the first, moments after the
        last frame the last.

    Raises:
        MediaError: undecodable, truncated, timeout.
    """
    assert media.video is not None
    canvas = Canvas(media.path, len(moments), sampling, pixel_aspect(media.video))
    step = 0
    # The end is read as well, to find truncated files, though nothing of it is decoded.
    for group in window_moments([*moments, end]):
        window = read_window(media, group[0], group[-1])
        if not window.complete:
            check_tail(media, window, end)
        shown = group[: len(moments) - step]
        if shown:
            targets = [Target(moment, step + i) for i, moment in enumerate(shown)]
            _fill(media, window, targets, canvas)
        step += len(shown)
    assert canvas.planes is not None  # every moment was filled, or an error raised
    return canvas.planes.transpose(0, 2, 3, 1)


def first_frame(media: OpenMedia, window: Window) -> VideoFrame:
    """Return the first frame that the packets of a window give.

    Raises:
        MediaError: undecodable, when none gives a frame.
    """
    for frame in _decode(media, iter(window.packets), None):
        return frame
    raise _no_frame(media, window)


def _no_frame(media: OpenMedia, window: Window) -> MediaError:
    seen = f"none of {len(window.packets)} video packets gave a frame"
    return MediaError(media.path, "undecodable", seen)


def _fill(media: OpenMedia, window: Window, targets: list[Target], canvas: Canvas) -> None:
    """Put the frame of each target on the canvas, decoding few packets where times allow it."""
    displayed = window.displayed
    if window.timed and displayed:
        seconds = [time for time, _ in displayed]
        steps_by_packet: dict[int, list[int]] = {}
        for target in targets:
            position = max(0, bisect.bisect_right(seconds, target.moment + TICK) - 1)
            packet = displayed[position][1]
            steps_by_packet.setdefault(packet, []).append(target.step)
        if _decode_runs(media, window, steps_by_packet, canvas):
            return
    _decode_all(media, window, targets, canvas)


def _decode_runs(
    media: OpenMedia,
    window: Window,
    steps_by_packet: dict[int, list[int]],
    canvas: Canvas,
) -> bool:
    """Decode some packets and those that they depend on; return whether each gave its frame."""
    assert media.video is not None
    packet_by_pts = {window.packets[i].pts: i for i in steps_by_packet}
    missing = set(steps_by_packet)
    # Other codecs mark frames as unreferenced that are not.
    skips_frames = media.video.codec_context.name == "h264"
    for first, last in dependency_runs(window, sorted(steps_by_packet)):
        run = (window.packets[i] for i in range(first, last + 1))
        needed = {window.packets[i].pts for i in steps_by_packet if first <= i <= last}
        for frame in _decode(media, run, needed if skips_frames else None):
            packet = packet_by_pts.get(frame.pts)
            if packet is not None:  # of several packets with one time, the last is shown
                canvas.put(frame, steps_by_packet[packet])
                missing.discard(packet)
    return not missing


def dependency_runs(window: Window, packets: list[int]) -> list[tuple[int, int]]:
    """Return ranges (first, last) of packet indices that must be decoded for these packets."""
    keys = [i for i, packet in enumerate(window.packets) if packet.is_keyframe]
    runs: list[tuple[int, int]] = []
    for index in packets:
        first = _key_before(window, keys, index)
        if runs and first <= runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], max(runs[-1][1], index))
        else:
            runs.append((first, index))
    return runs


def _key_before(window: Window, keys: list[int], index: int) -> int:
    """Return the key frame from which a packet is decoded; 0 without one.

    A frame displayed before the key frame that precedes it in the file refers to pictures before
    that key frame, so it is decoded from the previous one.
    """
    time = window.times[index] or 0.0
    for key in reversed(keys[: bisect.bisect_right(keys, index)]):
        if key == index or (window.times[key] or 0.0) <= time:
            return key
    return 0


def _decode_all(
    media: OpenMedia,
    window: Window,
    targets: list[Target],
    canvas: Canvas,
) -> None:
    """Decode all packets and show the last frame before each moment.

    This serves packets that are untimed or damaged.
    """
    assert media.video is not None
    rate = float(media.video.average_rate or 25)
    remaining = list(targets)
    latest: VideoFrame | None = None
    latest_time = 0.0
    for number, frame in enumerate(_decode(media, iter(window.packets), None)):
        if frame.pts is None or is_untimed(media):
            time = number / rate
        else:
            time = media.second(frame.pts, media.video.time_base)
        while remaining and latest is not None and time > remaining[0].moment + TICK:
            _put_near(media, window, remaining.pop(0), latest, latest_time, canvas)
        latest = frame
        latest_time = time
    if latest is None:
        raise _no_frame(media, window)
    for target in remaining:
        _put_near(media, window, target, latest, latest_time, canvas)


def _put_near(
    media: OpenMedia,
    window: Window,
    target: Target,
    frame: VideoFrame,
    time: float,
    canvas: Canvas,
) -> None:
    """Store a frame, unless the packets say that a later one belongs there and was not decoded."""
    seconds = [second for second, _ in window.displayed]
    position = bisect.bisect_right(seconds, target.moment + TICK) - 1
    gap = longest_gap(seconds, media)
    if position >= 0 and seconds[position] - time > TAIL_FRAMES * gap:
        seen = f"the frame at {seconds[position]:.3f} s cannot be decoded"
        raise MediaError(media.path, "undecodable", seen)
    canvas.put(frame, [target.step])


def _decode(
    media: OpenMedia,
    packets: Iterator[Packet],
    needed: set[int | None] | None,
) -> Iterator[VideoFrame]:
    """Yield the frames of a run of packets that begins at a key frame.

    With ``needed`` (timestamps) the decoder leaves out frames that are neither needed nor referred
    to by others.
    """
    decoder = media.video_decoder
    assert decoder is not None
    decoder.flush_buffers()
    skips = False
    decoder.skip_frame = "DEFAULT"
    for packet in packets:
        media.deadline.check()
        is_needed = needed is None or packet.pts in needed
        if is_needed == skips:  # to set it takes longer than all else that is done for a packet
            skips = not is_needed
            decoder.skip_frame = "NONREF" if skips else "DEFAULT"
        try:
            yield from decoder.decode(packet)
        except av.error.InvalidDataError:  # it matters only if a needed frame refers to it
            continue
    yield from decoder.decode(None)
    decoder.flush_buffers()
