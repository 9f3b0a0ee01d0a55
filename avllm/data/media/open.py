"""Open a media file: limits, deadline, its clock, and one error type for everything that fails."""

from __future__ import annotations

import math
import os
import re
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.packet import Packet
from av.stream import Discard, Disposition
from av.video.stream import VideoStream
from PIL import Image

from avllm.data.media.mp4_boxes import cut_box, missing_end
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

# Containers that hold media themselves. Playlists and scripts (hls, concat, ...) are left out, as
# they could name other files.
FORMATS = (
    "mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,wav,w64,aiff,au,caf,mp3,aac,ac3,eac3,flac,"
    "amr,gif,h264,hevc,m4v,ivf,obu,dv,mxf,rm,nut,swf,mjpeg"
)

# Raised by Pillow over damaged bytes, beside DecompressionBombError.
BROKEN_PICTURE = (
    OSError,
    SyntaxError,
    EOFError,
    ValueError,
    RuntimeError,
    ArithmeticError,
    LookupError,
    struct.error,
    zlib.error,
)

# Elementary streams: their headers declare no duration, so libav estimates one from the bit rate of
# the beginning.
ELEMENTARY = {"mp3", "aac", "ac3", "eac3"}


class MediaError(UserError):
    """A media file cannot be used.

    Attributes:
        path: the file.
        reason: one of ``REASONS``; counted by the loader and by ``avllm data check``.
        detail: what was seen, for a person.
    """

    def __init__(self, path: str | Path, reason: str, detail: str) -> None:
        if reason not in REASONS:
            raise ValueError(f"unknown reason {reason!r}; expected one of {', '.join(REASONS)}")
        super().__init__(str(path), reason, detail)  # all in args, for pickle
        self.path = str(path)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}: {self.detail}"


class Deadline:
    """Limit the wall-clock time of one load; ``check`` is called between packets."""

    def __init__(self, path: str | Path, seconds: float) -> None:
        self.path = path
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def check(self) -> None:
        """Raise ``MediaError`` (timeout) when the time is over."""
        if time.monotonic() > self._end:
            raise MediaError(self.path, "timeout", f"decoding took more than {self.seconds:g} s")


@dataclass(frozen=True)
class OpenMedia:
    """Hold an open file and its clock.

    Attributes:
        path: of the file.
        container: of libav.
        video: the first video track that is no cover picture, or None.
        audio: the first sound track, or None.
        origin: where the container starts, whichever stream that is, in seconds of its timestamps;
            second 0 of the file.
        deadline: of the load.
    """

    path: str
    container: InputContainer
    video: VideoStream | None
    audio: AudioStream | None
    origin: float
    deadline: Deadline

    def second(self, ticks: int, base: Fraction | None) -> float:
        """Return a timestamp in seconds of the file; ``base`` is its time base."""
        if base is None:
            return float(ticks) - self.origin
        return ticks * base.numerator / base.denominator - self.origin

    def ticks(self, second: float, stream: VideoStream | AudioStream) -> int:
        """Return a second of the file as a timestamp of a stream, rounded down."""
        return math.floor(self.exact_ticks(second, stream))

    def exact_ticks(self, second: float, stream: VideoStream | AudioStream) -> float:
        """Return a second of the file on a stream's clock, unrounded; it may be infinite."""
        return (second + self.origin) / float(stream.time_base or 1)

    def interval(self, start: float | None, end: float | None) -> tuple[float, float]:
        """Return the given interval within the file, in seconds of the file.

        Raises:
            MediaError: empty_interval.
        """
        duration = file_duration(self)
        first = 0.0 if start is None else float(start)
        last = duration if end is None else min(float(end), duration)
        given = start is not None or end is not None
        if first < 0 or last < first or (given and last == first):
            seen = f"start={start}, end={end} of a file of {duration:.3f} s"
            detail = f"{seen}; expected 0 <= start < end with start inside the file"
            raise MediaError(self.path, "empty_interval", detail)
        return first, last


def no_track(path: str | Path, reason: str, detail: str) -> MediaError:
    """Return the error for a missing track: ``truncated`` when the file was cut short."""
    detail_of_cut = missing_end(path)
    if detail_of_cut:
        return MediaError(path, "truncated", detail_of_cut)
    return MediaError(path, reason, detail)


@contextmanager
def media_errors(path: str | Path) -> Iterator[None]:
    """Map libav's exceptions to ``MediaError``."""
    try:
        yield
    except (av.error.TimeoutError, av.error.ExitError) as error:
        raise MediaError(path, "timeout", _message(error)) from error
    except av.FFmpegError as error:
        detail_of_cut = missing_end(path)
        if detail_of_cut:
            raise MediaError(path, "truncated", detail_of_cut) from error
        if is_picture(path):
            detail = "it is a still picture; give it as an image"
            raise MediaError(path, "undecodable", detail) from error
        raise MediaError(path, "undecodable", _message(error)) from error


def _message(error: av.FFmpegError) -> str:
    """Return libav's message without the error's number and the path, which a MediaError has."""
    return f"libav: {error.strerror}" if error.strerror else str(error)


@contextmanager
def open_media(path: str | Path, timeout: float, threads: int = 1) -> Iterator[OpenMedia]:
    """Open a file for reading, with decoders bounded to ``threads`` threads each.

    Raises:
        MediaError: missing, zero_byte, undecodable, truncated or timeout; also for errors that are
            raised while the file is open.
    """
    require_file(path)
    deadline = Deadline(path, timeout)
    with media_errors(path), _open_container(path, timeout) as container:
        cut = cut_box(path)
        if cut is not None and cut.kind == b"moov":  # libav would read the tracks that are left
            detail = f"{cut.missing} bytes of the header, at the end of the file, are missing"
            raise MediaError(path, "truncated", detail)
        video = next((s for s in container.streams.video if not _is_cover(s)), None)
        audio = next((s for s in container.streams.audio if s.codec_context is not None), None)
        for stream in (video, audio):
            if stream is not None:
                stream.codec_context.thread_count = threads
                stream.codec_context.thread_type = "AUTO" if threads > 1 else "SLICE"
        if video is not None:
            _check_size(path, video)
        # A negative start is codec delay, which the decoder removes: the clip itself starts at 0.
        origin = max(0.0, (container.start_time or 0) / av.time_base)
        yield OpenMedia(str(path), container, video, audio, origin, deadline)


def require_file(path: str | Path) -> None:
    """Raise ``MediaError`` unless ``path`` is a readable file that is not empty."""
    size = size_of(path)
    if size is None:
        exists = os.path.exists(path)
        seen = "it is a folder, a pipe or a device" if exists else "no such file"
        raise MediaError(path, "missing", f"{seen}; check the path")
    if size == 0:
        raise MediaError(path, "zero_byte", "the file is empty")
    if byte_range_of(path) is None and not os.access(path, os.R_OK):
        raise MediaError(path, "missing", "the file may not be read; check its permissions")


def is_picture(path: str | Path) -> bool:
    """Return whether Pillow reads a file as an image or animation, whatever its name is.

    Raises:
        MediaError: missing, zero_byte.
    """
    require_file(path)
    try:
        with open_bytes(path) as file, Image.open(file) as image:
            # Pillow also recognises MPEG video, by its first bytes.
            return Image.MIME.get(image.format or "", "").startswith("image/")
    except (*BROKEN_PICTURE, Image.DecompressionBombError):
        return False


def listen_to(media: OpenMedia, stream: VideoStream | AudioStream | None) -> None:
    """Deliver the packets of one stream, or of all.

    The others are skipped unread, in containers that allow it.
    """
    for other in media.container.streams:
        delivered = stream is None or other is stream
        other.discard = Discard.default if delivered else Discard.all


def seek(media: OpenMedia, stream: VideoStream | AudioStream, second: float) -> None:
    """Go to the last key frame of a stream at or before a second of the file, or further back."""
    listen_to(media, stream)  # MPEG-TS seeks by the stream's packets, which must not be skipped
    try:
        media.container.seek(media.ticks(second, stream), stream=stream, backward=True)
    except av.error.PermissionError:
        # AVI and FLV refuse a time before their first packet so, MPEG-PS any that it cannot find.
        # To read from the beginning is slower, and right as well.
        media.container.seek(0, stream=stream)


def rewind(media: OpenMedia, stream: VideoStream | AudioStream) -> None:
    """Go to the very first packet of a stream."""
    # 0 would skip the priming packets of a sound track, which lie before it.
    seek(media, stream, -1.0 - media.origin)


def read_packets(
    media: OpenMedia,
    stream: VideoStream | AudioStream | None = None,
) -> Iterator[Packet]:
    """Yield packets with data from the current position on, of one stream or of all.

    Raises:
        MediaError: timeout.
    """
    listen_to(media, stream)
    streams = () if stream is None else (stream,)
    while True:
        try:
            for packet in media.container.demux(*streams):
                media.deadline.check()
                if packet.size:
                    yield packet
            return
        except IndexError:
            # PyAV raises it for a packet of a stream that the header did not announce: read on.
            media.deadline.check()


def file_duration(media: OpenMedia) -> float:
    """Return the seconds from the container's start to its end.

    The end is the header's, or the last packet's where the header has none.
    """
    if media.container.duration and not _is_estimated(media):
        return max(0.0, media.container.duration / av.time_base * _stretch(media))
    last = 0.0
    for packet in read_packets(media):
        if packet.pts is not None:
            last = max(last, media.second(packet.pts + (packet.duration or 0), packet.time_base))
    return last


def stream_end(media: OpenMedia, stream: VideoStream | AudioStream) -> float | None:
    """Return the second of the file at which a stream ends by the header; None without one."""
    if _is_estimated(media):
        return None
    if stream.duration:
        ticks = round(stream.duration * _stretch(media)) + (stream.start_time or 0)
        return media.second(ticks, stream.time_base)
    tag = stream.metadata.get("DURATION")  # of matroska files: 00:00:10.005000000
    if tag and re.fullmatch(r"\d+:\d+:\d+(\.\d+)?", tag):
        hours, minutes, seconds = tag.split(":")
        return 3600 * float(hours) + 60 * float(minutes) + float(seconds) - media.origin
    only_stream = media.video is None or media.audio is None
    if only_stream and media.container.duration:
        return media.container.duration / av.time_base
    return None


def _is_estimated(media: OpenMedia) -> bool:
    """Return whether the duration is libav's estimate, which is wrong where the bit rate varies.

    In MP3 files of most encoders the first frame holds how many follow, and libav reads it.
    """
    container = media.container.format.name
    if container != "mp3":
        return container in ELEMENTARY
    with open_bytes(media.path) as file:
        file.seek(_id3_size(file.read(10)))
        first_frame = file.read(4096)
    return not any(mark in first_frame for mark in (b"Xing", b"Info", b"VBRI"))


def _id3_size(head: bytes) -> int:
    """Return the bytes of the ID3 tag that begins with these ten; 0 when they begin none."""
    if len(head) < 10 or not head.startswith(b"ID3"):
        return 0
    size = 0  # four bytes of seven bits each, without the ten of the header
    for byte in head[6:10]:
        size = (size << 7) | (byte & 0x7F)
    return 10 + size


def _stretch(media: OpenMedia) -> float:
    """Return the declared size of a WAV or AVI file divided by its true size.

    libav shortens their durations to the bytes that exist, which would hide that a file was cut.
    """
    if media.container.format.name not in ("wav", "avi"):
        return 1.0
    with open_bytes(media.path) as file:
        declared = int.from_bytes(file.read(8)[4:], "little") + 8
    if declared >= 0xFFFFFFFF:  # written to a pipe, with an unknown length
        return 1.0
    return max(1.0, declared / (size_of(media.path) or declared))


@contextmanager
def _open_container(path: str | Path, timeout: float) -> Iterator[InputContainer]:
    options = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
    with (
        _source(path) as source,
        av.open(
            source,
            "r",
            container_options=options,
            metadata_errors="ignore",
            timeout=timeout,
        ) as container,
    ):
        yield container


def _source(path: str | Path) -> AbstractContextManager[Any]:
    """Return a plain file's name, which libav opens, or a Python file of other bytes."""
    if byte_range_of(path) is None:
        return nullcontext(f"file:{os.path.abspath(path)}")
    return open_bytes(path)


def _is_cover(stream: VideoStream) -> bool:
    """Return whether a stream is the cover picture of a sound file, or has no decoder."""
    return stream.codec_context is None or Disposition.attached_pic in stream.disposition


def _check_size(path: str | Path, video: VideoStream) -> None:
    width, height = video.codec_context.width, video.codec_context.height
    if width <= 0 or height <= 0:
        seen = f"the header declares a picture of {width}x{height} pixels"
        raise MediaError(path, "undecodable", seen)
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        seen = f"the header declares a picture of {width}x{height} pixels"
        detail = f"{seen}; the limit is {MAX_SIDE} a side and {MAX_PIXELS} in all"
        raise MediaError(path, "absurd_header", detail)
