"""Say how long a file and its tracks last, by headers that the file's size bears out."""

from __future__ import annotations

import re
from pathlib import Path

import av
from av.audio.stream import AudioStream
from av.video.stream import VideoStream

from avllm.data.media.container.placeholders import is_placeholder
from avllm.data.media.container.tracks import check_rate
from avllm.data.media.errors import MediaError
from avllm.data.media.open import OpenMedia, read_packets
from avllm.data.store.storage import open_bytes, size_of

# Elementary streams: their headers declare no duration, so libav estimates one from the bit rate of
# the beginning.
ELEMENTARY = {"mp3", "aac", "ac3", "eac3"}

MAX_SECONDS = 48 * 3600.0  # of a file; memory and tokens follow from seconds
FREE_SECONDS = 300.0  # that are believed of a file of any size
LEAST_BYTES = 8.0  # of each further second: a tenth of what digital silence takes


def interval(media: OpenMedia, start: float | None, end: float | None) -> tuple[float, float]:
    """Return the given interval within the file, in seconds of the file.

    Raises:
        MediaError: empty_interval; absurd_header, where the file is too small for its duration.
    """
    return clip_interval(media.path, file_duration(media), start, end)


def clip_interval(
    path: str | Path,
    duration: float,
    start: float | None,
    end: float | None,
) -> tuple[float, float]:
    """Return the given interval within a file of ``duration`` seconds.

    Raises:
        MediaError: empty_interval.
    """
    first = 0.0 if start is None else float(start)
    last = duration if end is None else min(float(end), duration)
    given = start is not None or end is not None
    if first < 0 or last < first or (given and last == first):
        seen = f"start={start}, end={end} of a file of {duration:.3f} s"
        detail = f"{seen}; expected 0 <= start < end with start inside the file"
        raise MediaError(path, "empty_interval", detail)
    return first, last


def file_duration(media: OpenMedia) -> float:
    """Return the seconds from the container's start to its end.

    The end is the header's, or the last packet's where the header has none.

    Raises:
        MediaError: absurd_header, where the file is too small for it, or holds only sound of an
            absurd sampling rate.
    """
    if media.video is None and media.audio is not None:
        check_rate(media.path, media.audio.codec_context.sample_rate)
    seconds = _duration(media)
    check_duration(media.path, seconds)
    return seconds


def check_duration(path: str, seconds: float) -> None:
    """Refuse a duration that a file's bytes cannot fill, as after one wrong timestamp.

    Raises:
        MediaError: absurd_header.
    """
    size = size_of(path) or 0
    most = min(MAX_SECONDS, max(FREE_SECONDS, size / LEAST_BYTES))
    if not seconds <= most:
        seen = f"it lasts {seconds:.0f} s by its header or timestamps, and has {size} bytes"
        raise MediaError(path, "absurd_header", f"{seen}; expected at most {most:.0f} s")


def _duration(media: OpenMedia) -> float:
    if media.clock is not None:
        return max(0.0, max(media.clock.ends.values()) - media.origin)
    if media.container.duration and not _is_estimated(media):
        return max(0.0, media.container.duration / av.time_base * _stretch(media))
    last = 0.0
    for packet in read_packets(media):
        if packet.pts is not None:
            last = max(last, media.second(packet.pts + (packet.duration or 0), packet.time_base))
    return last


def stream_end(media: OpenMedia, stream: VideoStream | AudioStream) -> float | None:
    """Return the second of the file at which a stream ends by the header; None without one."""
    if media.clock is not None:
        end = media.clock.ends.get(stream.index)
        return None if end is None else end - media.origin
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
        declared = int.from_bytes(file.read(8)[4:], "little")
    if is_placeholder(declared):  # written to a pipe, with an unknown length
        return 1.0
    return max(1.0, (declared + 8) / (size_of(media.path) or declared + 8))
