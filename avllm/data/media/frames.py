"""The frames displayed at given moments, decoded from no more packets than they depend on.

The packets around the moments are read first, undecoded: their timestamps say which frame is on the screen at each
moment, so variable frame rates and edit lists need no arithmetic on indices. Then each wanted frame is decoded from the
key frame before it, leaving out the H.264 frames that no other frame refers to. Moments that are far apart in a long
file are sought one by one.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from avllm.data.media.open import MAX_BYTES, MediaError, OpenMedia, read_packets, rewind, seek, stream_end

if TYPE_CHECKING:
    from av.packet import Packet
    from av.video.frame import VideoFrame

    from avllm.data.media.sampling import Sampling

SEEK_GAP = 20.0  # seconds; reading on over a shorter gap costs less than seeking
MAX_WINDOW = 60.0  # seconds of packets that are held at a time
UNTIMED_DELAY = 1.0  # seconds read beyond the last moment where packets do not say when they are displayed
TICK = 1e-6  # seconds; a moment this close before a frame belongs to it
TAIL_FRAMES = 2.5  # frames that may be missing at the end before a file counts as truncated


@dataclass
class Canvas:
    """The output ``(T, H, W, 3)`` uint8, allocated when the first frame shows the true size and rotation.

    In memory it lies channel by channel, as the decoder gives it and as encoders take it: to pack pixels takes as long
    as a third of the scaling, and somebody would have to unpack them again.
    """

    path: str
    steps: int
    sampling: Sampling
    planes: np.ndarray | None = None  # (T, 3, H, W)
    width: int = 0  # of the picture before rotation
    height: int = 0
    reformatter: VideoReformatter = field(default_factory=VideoReformatter)  # kept: setting up takes as long as a frame

    def put(self, frame: VideoFrame, steps: list[int]) -> None:
        """Resize, rotate and store one frame at each of ``steps``."""
        if self.planes is None:
            self.width, self.height = self.sampling.size(frame.width, frame.height)
        # One thread: starting several for every frame takes longer than the work, above all beside other loaders.
        # To planes: libswscale scales to packed RGB half as fast, with half the chroma, and darker.
        form = "rgb24" if (self.width, self.height) == (frame.width, frame.height) else "gbrp"
        small = self.reformatter.reformat(frame, self.width, self.height, form, interpolation="BILINEAR", threads=1)
        matrix = display_matrix(frame)
        colours = [orient(colour, matrix) for colour in colours_of(small)]
        if self.planes is None:
            self.planes = np.empty((self.steps, 3, *colours[0].shape), np.uint8)
        height, width = self.planes.shape[2:]
        if colours[0].shape != (height, width):
            seen = f"{colours[0].shape[1]}x{colours[0].shape[0]} after {width}x{height}"
            raise MediaError(self.path, "undecodable", f"the picture turns within the clip: {seen}")
        for step in steps:
            for channel, colour in enumerate(colours):
                self.planes[step, channel] = colour


@dataclass
class Window:
    """Packets of one stretch of a video, in decoding order, from a key frame on.

    Attributes:
        packets: with their data.
        times: second of the file at which each is displayed; None where the container does not say.
        complete: False when the file ended before the stretch did.
    """

    packets: list[Packet]
    times: list[float | None]
    complete: bool

    def displayed(self) -> list[tuple[float, int]]:
        """Sorted (second, packet index) of the packets that appear on the screen."""
        shown = enumerate(zip(self.times, self.packets, strict=True))
        return sorted((t, i) for i, (t, p) in shown if t is not None and not p.is_discard and not p.is_corrupt)

    @property
    def cut(self) -> bool:
        """Whether an edit list hides what the first packets show: the mark of a cut without re-encoding."""
        return any(packet.is_discard for packet in self.packets[:1])

    @property
    def closed(self) -> bool:
        """Whether no frame leans on a picture before the key frame that precedes it in the file."""
        key = -math.inf
        for packet, time in zip(self.packets, self.times, strict=True):
            if packet.is_keyframe:
                key = -math.inf if time is None else time
            elif time is not None and time < key:
                return False
        return True

    @property
    def timed(self) -> bool:
        """Whether every packet knows its time."""
        return all(time is not None for time in self.times)


def colours_of(frame: VideoFrame) -> list[np.ndarray]:
    """Red, green and blue ``(H, W)`` of a frame in ``gbrp`` or ``rgb24``: views of its memory."""
    size = frame.height, frame.width
    lines = [np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size) for plane in frame.planes]
    if frame.format.name == "gbrp":
        return [lines[number][: size[0], : size[1]] for number in (2, 0, 1)]
    pixels = lines[0][: size[0], : 3 * size[1]].reshape(*size, 3)
    return [pixels[:, :, number] for number in range(3)]


def display_matrix(frame: VideoFrame) -> np.ndarray | None:
    """The container's 3x3 display matrix (ISO 14496-12), or None."""
    data: Any = frame.side_data.get("DISPLAYMATRIX")
    return None if data is None else np.frombuffer(data, np.int32).reshape(3, 3)


def orient(picture: np.ndarray, matrix: np.ndarray | None) -> np.ndarray:
    """Turn and mirror a picture ``(H, W)`` or ``(H, W, 3)`` as its display matrix says (the right-angled ones)."""
    if matrix is None:
        return picture
    turned = abs(int(matrix[0, 0])) < abs(int(matrix[0, 1]))
    if turned:
        picture = picture.swapaxes(0, 1)
    x, y = (matrix[1, 0], matrix[0, 1]) if turned else (matrix[0, 0], matrix[1, 1])
    if x < 0:
        picture = picture[:, ::-1]
    if y < 0:
        picture = picture[::-1]
    return picture


def rotation(matrix: np.ndarray | None) -> int:
    """Degrees clockwise (0, 90, 180, 270) by which the stored picture is turned for display."""
    if matrix is None:
        return 0
    return round(float(np.degrees(np.arctan2(float(matrix[0, 1]), float(matrix[0, 0]))))) % 360


def mirrored(matrix: np.ndarray | None) -> bool:
    """Whether the stored picture is flipped for display: the matrix has a negative determinant."""
    return matrix is not None and float(np.linalg.det(matrix[:2, :2].astype(float))) < 0


def displayed_size(frame: VideoFrame) -> tuple[int, int]:
    """Width and height after rotation."""
    upright = rotation(display_matrix(frame)) % 180 == 0
    return (frame.width, frame.height) if upright else (frame.height, frame.width)


def read_frames(media: OpenMedia, moments: list[float], end: float, sampling: Sampling) -> np.ndarray:
    """The frame on the screen at each moment.

    Args:
        moments: seconds of the file, ascending.
        end: second of the file up to which there must be picture (``truncated`` otherwise).

    Returns:
        uint8 RGB ``(T, H, W, 3)``. Before the first frame its own picture stands, after the last one the last.

    Raises:
        MediaError: undecodable, truncated, timeout.
    """
    _check_memory(media, len(moments), sampling)
    canvas = Canvas(media.path, len(moments), sampling)
    step = 0
    for group in window_moments([*moments, end]):  # the end is read as well, though nothing of it is decoded
        window = read_window(media, group[0], group[-1])
        wanted = group if step + len(group) <= len(moments) else group[:-1]
        steps = list(range(step, step + len(wanted)))
        step += len(wanted)
        if not window.complete:
            _check_tail(media, window, end)
        if wanted:
            _fill(media, window, wanted, steps, canvas)
    assert canvas.planes is not None  # every moment was filled, or an error raised
    return canvas.planes.transpose(0, 2, 3, 1)


def first_frame(media: OpenMedia, window: Window) -> VideoFrame:
    """The first frame that the packets of a window give; raises ``MediaError`` (undecodable) when none does."""
    for frame in _decode(media, iter(window.packets), None):
        return frame
    raise MediaError(media.path, "undecodable", f"none of {len(window.packets)} video packets gave a frame")


def window_moments(moments: list[float]) -> list[list[float]]:
    """Split ascending moments into groups that are read in one go."""
    groups: list[list[float]] = []
    for moment in moments:
        near = groups and moment - groups[-1][-1] <= SEEK_GAP and moment - groups[-1][0] <= MAX_WINDOW
        if near:
            groups[-1].append(moment)
        else:
            groups.append([moment])
    return groups


def read_window(media: OpenMedia, first: float, last: float) -> Window:
    """Packets from the key frame before second ``first`` to second ``last``."""
    if media.video is not None and _is_untimed(media):
        return _read_from(media, 0.0, last + UNTIMED_DELAY)
    back = 0.0
    while True:
        seek_to = first - back
        window = _read_from(media, seek_to, last)
        shown = window.displayed()
        keys = [t for t, i in shown if window.packets[i].is_keyframe]
        if seek_to <= 0 or (window.timed and keys and keys[0] <= first + TICK):
            return window
        back = 2 * back + 2.0  # the key frame that the container found is displayed after `first`


def _is_untimed(media: OpenMedia) -> bool:
    """AVI stores the decoding order alone: where frames are reordered, libav's guess at their times is wrong."""
    assert media.video is not None
    return media.container.format.name == "avi" and media.video.codec_context.has_b_frames


def _read_from(media: OpenMedia, seek_to: float, last: float) -> Window:
    assert media.video is not None
    stream, base, untimed = media.video, media.video.time_base, _is_untimed(media)
    if seek_to <= 0:
        rewind(media, stream)
    else:
        seek(media, stream, seek_to)
    window, latest = Window([], [], complete=False), media.place(last + TICK, stream)
    for packet in read_packets(media, stream):
        late = packet.dts is not None and packet.dts > latest
        if late and window.packets:  # a track that starts after `last` still gives its first frame
            window.complete = True  # dts never exceeds pts: nothing that is displayed by `last` comes after this
            break
        if window.packets or packet.is_keyframe:
            window.packets.append(packet)
            unknown = packet.pts is None or untimed
            window.times.append(None if unknown else media.second(packet.pts or 0, base))
    return window


def _fill(media: OpenMedia, window: Window, moments: list[float], steps: list[int], canvas: Canvas) -> None:
    shown = window.displayed()
    if window.timed and shown:
        seconds = [t for t, _ in shown]
        wanted: dict[int, list[int]] = {}  # packet index -> steps that show it
        for moment, step in zip(moments, steps, strict=True):
            at = max(0, bisect.bisect_right(seconds, moment + TICK) - 1)
            wanted.setdefault(shown[at][1], []).append(step)
        missing = _decode_runs(media, window, wanted, canvas)
        if not missing:
            return
    _decode_all(media, window, moments, steps, canvas)


def _decode_runs(media: OpenMedia, window: Window, wanted: dict[int, list[int]], canvas: Canvas) -> set[int]:
    """Decode the wanted packets and what they depend on; returns the wanted ones that gave no frame."""
    assert media.video is not None
    by_pts = {window.packets[i].pts: i for i in wanted}
    missing = set(wanted)
    skips = media.video.codec_context.name == "h264"  # elsewhere "non-reference" is not strict enough to leave out
    for first, last in dependency_runs(window, sorted(wanted)):
        run = (window.packets[i] for i in range(first, last + 1))
        keep = {window.packets[i].pts for i in wanted if first <= i <= last}
        for frame in _decode(media, run, keep if skips else None):
            index = by_pts.get(frame.pts)
            if index in missing:
                canvas.put(frame, wanted[index])
                missing.discard(index)
    return missing


def dependency_runs(window: Window, wanted: list[int]) -> list[tuple[int, int]]:
    """Ranges (first, last) of packet indices that must be decoded for the wanted ones."""
    keys = [i for i, packet in enumerate(window.packets) if packet.is_keyframe]
    runs: list[tuple[int, int]] = []
    for index in wanted:
        time = window.times[index]
        # A frame displayed before the key frame that precedes it in the file leans on the key frame before that one.
        before = [k for k in keys if k <= index and (k == index or (window.times[k] or 0.0) <= (time or 0.0))]
        first = before[-1] if before else 0
        if runs and first <= runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], max(runs[-1][1], index))
        else:
            runs.append((first, index))
    return runs


def _decode_all(media: OpenMedia, window: Window, moments: list[float], steps: list[int], canvas: Canvas) -> None:
    """Decode every packet of the window and show the last frame before each moment (untimed or damaged packets)."""
    assert media.video is not None
    rate = float(media.video.average_rate or 25)
    todo = list(zip(moments, steps, strict=True))
    shown: tuple[float, VideoFrame] | None = None
    for number, frame in enumerate(_decode(media, iter(window.packets), None)):
        unknown = frame.pts is None or _is_untimed(media)
        time = number / rate if unknown else media.second(frame.pts or 0, media.video.time_base)
        while todo and shown is not None and time > todo[0][0] + TICK:
            _put_near(media, window, todo.pop(0), shown, canvas)
        shown = (time, frame)
    if shown is None:
        raise MediaError(media.path, "undecodable", f"none of {len(window.packets)} video packets gave a frame")
    for moment in todo:
        _put_near(media, window, moment, shown, canvas)


def _put_near(
    media: OpenMedia, window: Window, todo: tuple[float, int], shown: tuple[float, VideoFrame], canvas: Canvas
) -> None:
    """Store a frame unless the packets say that another one belongs there."""
    moment, step = todo
    seconds = [t for t, _ in window.displayed()]
    at = bisect.bisect_right(seconds, moment + TICK) - 1
    gap = _longest_gap(seconds, media)
    if at >= 0 and seconds[at] - shown[0] > TAIL_FRAMES * gap:
        raise MediaError(media.path, "undecodable", f"the frame at {seconds[at]:.3f} s cannot be decoded")
    canvas.put(shown[1], [step])


def _decode(media: OpenMedia, packets: Iterator[Packet], keep: set[int | None] | None) -> Iterator[VideoFrame]:
    """Frames of a run of packets that begins at a key frame.

    With ``keep`` (timestamps) the decoder leaves out frames that are neither kept nor referred to by others.
    """
    assert media.video is not None
    decoder = media.video.codec_context
    decoder.flush_buffers()
    for packet in packets:
        media.deadline.check()
        decoder.skip_frame = "DEFAULT" if keep is None or packet.pts in keep else "NONREF"
        try:
            yield from decoder.decode(packet)
        except av.error.InvalidDataError:  # a damaged packet matters only if a wanted frame needed it
            continue
    yield from decoder.decode(None)
    decoder.flush_buffers()


def _check_tail(media: OpenMedia, window: Window, end: float) -> None:
    """Raise ``truncated`` when the picture ends well before both the interval and the stream should."""
    assert media.video is not None
    expected = stream_end(media, media.video)
    shown = window.displayed()
    if not window.packets:
        raise MediaError(media.path, "truncated", f"no video packet up to {end:.3f} s")
    if expected is None or not shown:
        return
    last, index = shown[-1]
    gap = _longest_gap([t for t, _ in shown], media)
    packet = window.packets[index]
    last += media.second(packet.duration or 0, media.video.time_base) + media.origin
    expected = min(expected, end)
    if expected - last > TAIL_FRAMES * gap:
        raise MediaError(media.path, "truncated", f"the picture ends at {last:.3f} s; expected {expected:.3f} s")


def _longest_gap(seconds: list[float], media: OpenMedia) -> float:
    """The longest time between frames: what "one frame" means where the rate varies."""
    assert media.video is not None
    usual = 1.0 / float(media.video.average_rate or 25)
    return max([usual, *(b - a for a, b in itertools.pairwise(seconds))])


def _check_memory(media: OpenMedia, steps: int, sampling: Sampling) -> None:
    assert media.video is not None
    width, height = sampling.size(media.video.codec_context.width, media.video.codec_context.height)
    size = steps * width * height * 3
    if size > MAX_BYTES:
        seen = f"{steps} frames of {width}x{height} pixels take {size} bytes; the limit is {MAX_BYTES}"
        raise MediaError(media.path, "undecodable", f"{seen}; ask for fewer frames or a smaller short_side")
