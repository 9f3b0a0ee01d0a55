"""Opening a media file: limits, deadline, the clip's clock, and one error type for all that can go wrong."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream

REASONS = (
    "missing",
    "zero_byte",
    "undecodable",
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


class MediaError(ValueError):
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


@contextmanager
def media_errors(path: str | Path) -> Iterator[None]:
    """Map libav's exceptions to ``MediaError``."""
    try:
        yield
    except (av.error.TimeoutError, av.error.ExitError) as error:
        raise MediaError(path, "timeout", str(error)) from error
    except av.FFmpegError as error:
        cut = _cut_short(path)
        raise MediaError(path, "truncated" if cut else "undecodable", cut or str(error)) from error


@contextmanager
def open_media(path: str | Path, timeout: float, threads: int = 1) -> Iterator[OpenMedia]:
    """Open a file for reading, with decoders bounded to ``threads`` threads each.

    Raises:
        MediaError: missing, zero_byte, undecodable, truncated or timeout; also for errors raised while it is open.
    """
    require_file(path)
    deadline = Deadline(path, timeout)
    with media_errors(path), _open_container(path, timeout) as container:
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
    if not os.path.isfile(path):
        raise MediaError(path, "missing", "no such file; check the path in the manifest")
    if os.path.getsize(path) == 0:
        raise MediaError(path, "zero_byte", "the file is empty")


def rewind(media: OpenMedia, stream: VideoStream | AudioStream) -> None:
    """Go to the very first packet of a stream."""
    try:  # 0 would pass over the priming packets of a sound track, which stand before it
        media.container.seek(int(-1 / stream.time_base), stream=stream)
    except av.error.PermissionError:  # how AVI and FLV refuse a time before their first packet
        media.container.seek(0, stream=stream)


def read_packets(media: OpenMedia, stream: VideoStream | AudioStream | None = None) -> Iterator[Packet]:
    """Packets with data from where the file stands, of one stream or of all; watches the deadline."""
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
    if media.container.duration:
        return max(0.0, media.container.duration / av.time_base) + _missing_seconds(media)
    last = 0.0
    for packet in read_packets(media):
        if packet.pts is not None and packet.time_base is not None:
            last = max(last, float((packet.pts + (packet.duration or 0)) * packet.time_base) - media.origin)
    return last


def stream_end(media: OpenMedia, stream: VideoStream | AudioStream) -> float | None:
    """Second of the file at which the header says the stream ends; None when it does not say."""
    if stream.duration:
        end = float((stream.duration + (stream.start_time or 0)) * stream.time_base) - media.origin
        return end + _missing_seconds(media)
    tag = stream.metadata.get("DURATION")  # how matroska files say it: 00:00:10.005000000
    if tag and re.fullmatch(r"\d+:\d+:\d+(\.\d+)?", tag):
        hours, minutes, seconds = tag.split(":")
        return 3600 * float(hours) + 60 * float(minutes) + float(seconds) - media.origin
    alone = media.video is None or media.audio is None
    return media.container.duration / av.time_base if alone and media.container.duration else None


def _missing_seconds(media: OpenMedia) -> float:
    """Sound that a WAV header declares beyond the end of the file; libav itself goes by what is there."""
    if media.container.format.name != "wav" or media.audio is None or not media.audio.codec_context.bit_rate:
        return 0.0
    with open(media.path, "rb") as file:
        head = file.read(8)
    declared = int.from_bytes(head[4:8], "little")
    if declared in (0, 0xFFFFFFFF):  # written to a pipe: the length was not known
        return 0.0
    missing = declared + 8 - os.path.getsize(media.path)
    return max(0, missing) * 8 / media.audio.codec_context.bit_rate


def _open_container(path: str | Path, timeout: float) -> InputContainer:
    return av.open(
        f"file:{os.path.abspath(path)}",
        container_options={"format_whitelist": FORMATS, "protocol_whitelist": "file"},
        metadata_errors="ignore",
        timeout=timeout,
    )


def _is_cover(stream: VideoStream) -> bool:
    return stream.codec_context is None or "attached_pic" in str(stream.disposition)


def _check_size(path: str | Path, video: VideoStream) -> None:
    width, height = video.codec_context.width, video.codec_context.height
    if width <= 0 or height <= 0:
        raise MediaError(path, "undecodable", f"the header declares a picture of {width}x{height} pixels")
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        limit = f"the limit is {MAX_SIDE} a side and {MAX_PIXELS} in all"
        raise MediaError(path, "undecodable", f"the header declares a picture of {width}x{height} pixels; {limit}")


def _cut_short(path: str | Path) -> str:
    """What is missing of an MP4 whose outermost boxes run past the end of the file; "" for all other files."""
    size, position = os.path.getsize(path), 0
    with open(path, "rb") as file:
        while position + 8 <= size:
            file.seek(position)
            head = file.read(16)
            length, kind = int.from_bytes(head[:4], "big"), head[4:8]
            if position == 0 and kind != b"ftyp":
                return ""
            if length == 1:
                length = int.from_bytes(head[8:16], "big")
            if length < 8:  # 0: the box reaches to the end of the file, whatever that is
                return ""
            position += length
    missing = position - size
    return f"{missing} bytes are missing at the end" if missing > 0 else ""
