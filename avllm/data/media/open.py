"""Opening a media file: limits, deadline, the clip's clock, and one error type for all that can go wrong."""

from __future__ import annotations

import math
import os
import re
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.packet import Packet
from av.stream import Discard
from av.video.stream import VideoStream
from PIL import Image

from avllm.data.store.storage import byte_range_of, open_bytes, size_of
from avllm.errors import UserError

REASONS = (
    "missing",
    "zero_byte",
    "undecodable",
    "absurd_header",
    "truncated",
    "no_video",
    "no_audio",
    "timeout",
    "empty_interval",
)

MAX_SIDE = 16_384  # pixels; a header that declares more is refused before anything is allocated
MAX_PIXELS = 8_192 * 8_192
MAX_BYTES = 8 * 2**30  # decoded frames, or decoded sound, of one clip

# Containers that hold media themselves; playlists and scripts (hls, concat, ...) could name other files.
FORMATS = (
    "mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,wav,w64,aiff,au,caf,mp3,aac,ac3,eac3,flac,amr,gif,h264,hevc,m4v,"
    "ivf,obu,dv,mxf,rm,nut,swf,mjpeg"
)


# What Pillow's readers of forms raise over damaged bytes, beside DecompressionBombError.
BROKEN_PICTURE = (
    OSError, SyntaxError, EOFError, ValueError, RuntimeError, ArithmeticError, LookupError, struct.error, zlib.error
)  # fmt: skip

# Elementary streams: their headers declare no duration, libav estimates one from the bit rate of the beginning.
ELEMENTARY = {"mp3", "aac", "ac3", "eac3"}


class MediaError(UserError):
    """A media file that cannot be used.

    Attributes:
        path: the file.
        reason: one of ``REASONS``; counted by the loader and by ``avllm data check``.
        detail: what was seen, for a person.
    """

    def __init__(self, path: str | Path, reason: str, detail: str) -> None:
        if reason not in REASONS:
            raise ValueError(f"unknown reason {reason!r}; expected one of {', '.join(REASONS)}")
        super().__init__(str(path), reason, detail)  # all three in args: the error crosses process borders by pickle
        self.path = str(path)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}: {self.detail}"


class Deadline:
    """The wall-clock limit of one load; ``check`` is called between packets."""

    def __init__(self, path: str | Path, seconds: float) -> None:
        self.path, self.seconds = path, seconds
        self._end = time.monotonic() + seconds

    def check(self) -> None:
        """Raise ``MediaError`` (timeout) when the time is over."""
        if time.monotonic() > self._end:
            raise MediaError(self.path, "timeout", f"decoding took more than {self.seconds:g} s")


@dataclass(frozen=True)
class OpenMedia:
    """An open file and its clock: second 0 is where the container starts, whichever stream that is."""

    path: str
    container: InputContainer
    video: VideoStream | None
    audio: AudioStream | None
    origin: float
    deadline: Deadline

    def second(self, ticks: int, base: Fraction | None) -> float:
        """A timestamp in seconds of the file; ``base`` is its time base."""
        return (float(ticks) if base is None else ticks * base.numerator / base.denominator) - self.origin

    def ticks(self, second: float, stream: VideoStream | AudioStream) -> int:
        """A second of the file as a timestamp of a stream, rounded down."""
        return math.floor(self.place(second, stream))

    def place(self, second: float, stream: VideoStream | AudioStream) -> float:
        """A second of the file on a stream's clock, between two of its ticks; infinity stays what it is."""
        return (second + self.origin) / float(stream.time_base or 1)

    def interval(self, start: float | None, end: float | None) -> tuple[float, float]:
        """The asked interval within the file, in seconds of the file."""
        duration = file_duration(self)
        first = 0.0 if start is None else float(start)
        last = duration if end is None else min(float(end), duration)
        asked = start is not None or end is not None
        if first < 0 or last < first or (asked and last == first):
            seen = f"start={start}, end={end} of a file of {duration:.3f} s"
            raise MediaError(
                self.path, "empty_interval", f"{seen}; expected 0 <= start < end with start inside the file"
            )
        return first, last


def no_track(path: str | Path, reason: str, detail: str) -> MediaError:
    """The error for a track that is not there: a file that was cut short may have lost it."""
    cut = _cut_short(path)
    return MediaError(path, "truncated", cut) if cut else MediaError(path, reason, detail)


@contextmanager
def media_errors(path: str | Path) -> Iterator[None]:
    """Map libav's exceptions to ``MediaError``."""
    try:
        yield
    except (av.error.TimeoutError, av.error.ExitError) as error:
        raise MediaError(path, "timeout", _words(error)) from error
    except av.FFmpegError as error:
        cut = _cut_short(path)
        seen = "it is a still picture; give it as an image" if not cut and is_picture(path) else _words(error)
        raise MediaError(path, "truncated" if cut else "undecodable", cut or seen) from error


def _words(error: av.FFmpegError) -> str:
    """What libav says, without the number of the error and the path, which a MediaError has."""
    return f"libav: {error.strerror}" if error.strerror else str(error)


@contextmanager
def open_media(path: str | Path, timeout: float, threads: int = 1) -> Iterator[OpenMedia]:
    """Open a file for reading, with decoders bounded to ``threads`` threads each.

    Raises:
        MediaError: missing, zero_byte, undecodable, truncated or timeout; also for errors raised while it is open.
    """
    require_file(path)
    deadline = Deadline(path, timeout)
    with media_errors(path), _open_container(path, timeout) as container:
        cut = _cut_box(path)
        if cut and cut[0] == b"moov":  # libav reads on with the tracks that were left of the header
            raise MediaError(path, "truncated", f"{cut[1]} bytes of the header, which stands last, are missing")
        video = next((s for s in container.streams.video if not _is_cover(s)), None)
        audio = next((s for s in container.streams.audio if s.codec_context is not None), None)
        for stream in (video, audio):
            if stream is not None:
                stream.codec_context.thread_count = threads
                stream.codec_context.thread_type = "AUTO" if threads > 1 else "SLICE"
        if video is not None:
            _check_size(path, video)
        # A negative start is codec delay that the decoder takes off again: the clip itself starts at 0.
        origin = max(0.0, (container.start_time or 0) / av.time_base)
        yield OpenMedia(str(path), container, video, audio, origin, deadline)


def require_file(path: str | Path) -> None:
    """Raise ``MediaError`` unless ``path`` is a file with something in it."""
    size = size_of(path)
    if size is None:
        seen = "it is a folder, a pipe or a device" if os.path.exists(path) else "no such file"
        raise MediaError(path, "missing", f"{seen}; check the path")
    if size == 0:
        raise MediaError(path, "zero_byte", "the file is empty")
    if byte_range_of(path) is None and not os.access(path, os.R_OK):
        raise MediaError(path, "missing", "the file is there and may not be read; check its permissions")


def is_picture(path: str | Path) -> bool:
    """Whether a file holds a still image (or an animation of Pillow's), whatever its name is.

    Raises:
        MediaError: missing, zero_byte.
    """
    require_file(path)
    try:
        with open_bytes(path) as file, Image.open(file) as image:
            return Image.MIME.get(image.format or "", "").startswith("image/")  # it knows MPEG video by its first bytes
    except (*BROKEN_PICTURE, Image.DecompressionBombError):
        return False


def listen_to(media: OpenMedia, stream: VideoStream | AudioStream | None) -> None:
    """Let the packets of one stream through, or of all; the others are passed over unread, where the container can."""
    for other in media.container.streams:
        other.discard = Discard.default if stream is None or other is stream else Discard.all


def seek(media: OpenMedia, stream: VideoStream | AudioStream, second: float) -> None:
    """Go to the last key frame of a stream that is not behind a second of the file, or to a packet before it."""
    listen_to(media, stream)  # MPEG-TS finds its way by the stream's packets, which must not be passed over
    try:
        media.container.seek(media.ticks(second, stream), stream=stream, backward=True)
    except av.error.PermissionError:  # how AVI and FLV refuse a time before their first packet, MPEG-PS any it cannot
        media.container.seek(0, stream=stream)  # find: what is read from the beginning is right as well


def rewind(media: OpenMedia, stream: VideoStream | AudioStream) -> None:
    """Go to the very first packet of a stream."""
    seek(media, stream, -1.0 - media.origin)  # 0 would pass over the priming packets of a sound track, before it


def read_packets(media: OpenMedia, stream: VideoStream | AudioStream | None = None) -> Iterator[Packet]:
    """Packets with data from where the file stands, of one stream or of all; watches the deadline."""
    listen_to(media, stream)
    while True:
        try:
            for packet in media.container.demux() if stream is None else media.container.demux(stream):
                media.deadline.check()
                if packet.size:
                    yield packet
            return
        except IndexError:  # PyAV's answer to a packet of a stream that the header did not announce: read on behind it
            media.deadline.check()


def file_duration(media: OpenMedia) -> float:
    """Seconds from the container's start to the end that its header, or else its last packet, says."""
    if media.container.duration and not _is_estimated(media):
        return max(0.0, media.container.duration / av.time_base * _stretch(media))
    last = 0.0
    for packet in read_packets(media):
        if packet.pts is not None:
            last = max(last, media.second(packet.pts + (packet.duration or 0), packet.time_base))
    return last


def stream_end(media: OpenMedia, stream: VideoStream | AudioStream) -> float | None:
    """Second of the file at which the header says the stream ends; None when it does not say."""
    if _is_estimated(media):
        return None
    if stream.duration:
        ticks = round(stream.duration * _stretch(media)) + (stream.start_time or 0)
        return media.second(ticks, stream.time_base)
    tag = stream.metadata.get("DURATION")  # how matroska files say it: 00:00:10.005000000
    if tag and re.fullmatch(r"\d+:\d+:\d+(\.\d+)?", tag):
        hours, minutes, seconds = tag.split(":")
        return 3600 * float(hours) + 60 * float(minutes) + float(seconds) - media.origin
    alone = media.video is None or media.audio is None
    return media.container.duration / av.time_base if alone and media.container.duration else None


def _is_estimated(media: OpenMedia) -> bool:
    """Whether the duration is libav's estimate, which is wrong where the bit rate varies."""
    kind = media.container.format.name
    if kind != "mp3":
        return kind in ELEMENTARY
    with open_bytes(media.path) as file:
        head = file.read(10)
        if len(head) == 10 and head.startswith(b"ID3"):  # its size, seven bits a byte, does not count its own header
            file.seek(10 + sum((byte & 0x7F) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True)))
        else:
            file.seek(0)
        first = file.read(4096)  # the first frame says how many follow, in files of most encoders
    return not any(mark in first for mark in (b"Xing", b"Info", b"VBRI"))


def _stretch(media: OpenMedia) -> float:
    """Declared size of a WAV or AVI file by its true one: libav cuts their durations down to what is there."""
    if media.container.format.name not in ("wav", "avi"):
        return 1.0
    with open_bytes(media.path) as file:
        declared = int.from_bytes(file.read(8)[4:], "little") + 8
    if declared >= 0xFFFFFFFF:  # written to a pipe: the length was not known
        return 1.0
    return max(1.0, declared / (size_of(media.path) or declared))


@contextmanager
def _open_container(path: str | Path, timeout: float) -> Iterator[InputContainer]:
    options = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
    # libav reads a plain file by itself; what lies in a shard or behind a URL it reads through a Python file
    source = nullcontext(f"file:{os.path.abspath(path)}") if byte_range_of(path) is None else open_bytes(path)
    with (
        source as file,
        av.open(file, "r", container_options=options, metadata_errors="ignore", timeout=timeout) as container,
    ):
        yield container


def _is_cover(stream: VideoStream) -> bool:
    return stream.codec_context is None or "attached_pic" in str(stream.disposition)


def _check_size(path: str | Path, video: VideoStream) -> None:
    width, height = video.codec_context.width, video.codec_context.height
    if width <= 0 or height <= 0:
        raise MediaError(path, "undecodable", f"the header declares a picture of {width}x{height} pixels")
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        limit = f"the limit is {MAX_SIDE} a side and {MAX_PIXELS} in all"
        raise MediaError(path, "absurd_header", f"the header declares a picture of {width}x{height} pixels; {limit}")


def _cut_box(path: str | Path) -> tuple[bytes, int] | None:
    """Kind of the outermost MP4 box that runs past the end of the file, and the bytes that are missing."""
    size, position, kind = size_of(path) or 0, 0, b""
    with open_bytes(path) as file:
        while position + 8 <= size:
            file.seek(position)
            head = file.read(16)
            length, kind = int.from_bytes(head[:4], "big"), head[4:8]
            if position == 0 and kind != b"ftyp":
                return None
            if length == 1:
                length = int.from_bytes(head[8:16], "big")
            if length < 8:  # 0: the box reaches to the end of the file, whatever that is
                return None
            position += length
    return (kind, position - size) if position > size else None


def _cut_short(path: str | Path) -> str:
    """What is missing of an MP4 that was cut short; "" for all other files."""
    cut = _cut_box(path)
    return f"{cut[1]} bytes are missing at the end" if cut else ""
