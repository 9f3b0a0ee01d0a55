"""Open a media file: its container, its tracks, its clock, and one error type for all failures."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.packet import Packet
from av.stream import Discard
from av.video.codeccontext import VideoCodecContext
from av.video.stream import VideoStream
from PIL import Image

from avllm.data.media.container.mp4_boxes import cut_box, missing_end, still_brand
from avllm.data.media.container.placeholders import repaired
from avllm.data.media.container.restarts import JOINABLE, STEP_BACK, RisingClock, find_restarts
from avllm.data.media.container.tracks import check_size, decoder_of, sound_track, video_track
from avllm.data.media.errors import BROKEN_PICTURE, Deadline, MediaError
from avllm.data.store.storage import (
    byte_range_of,
    is_utf8,
    open_bytes,
    size_of,
    without_file_scheme,
)

# Containers that hold media themselves. Playlists and scripts (hls, concat, ...) are left out, as
# they could name other files.
FORMATS = (
    "mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,wav,w64,aiff,au,caf,mp3,aac,ac3,eac3,flac,"
    "amr,gif,h264,hevc,m4v,ivf,obu,dv,mxf,rm,nut,swf,mjpeg"
)


STILL = "it is a still picture; give it as an image"


MOST_CLOCKS = 4096  # files whose packets were looked at, and need not be again in this process
_clocks: dict[tuple[str, int, int], RisingClock | None] = {}


def _state_of(path: str) -> tuple[str, int, int]:
    """Return the name of a file, its size and its time of change, which reveal a change."""
    byte_range = byte_range_of(path)
    file = str(without_file_scheme(path)) if byte_range is None else byte_range.file
    changed = os.stat(file).st_mtime_ns if os.path.isfile(file) else 0
    return path, size_of(path) or 0, changed


class TimeStepsBack(Exception):
    """The decoding times of a track step back: the file has to be read with a rising clock."""


@dataclass
class OpenMedia:
    """Hold an open file and its clock.

    Attributes:
        path: of the file.
        track: number of the sound track, from 0; None = the default one.
        threads: of each decoder.
        deadline: of the load.
        container: of libav.
        video: the default video track, or the first that is no cover picture, or None.
        video_decoder: of the video track.
        audio: the sound track, or None.
        origin: where the container starts, whichever stream that is, in seconds of its timestamps;
            second 0 of the file.
        clock: makes times rise where they begin again; None where they rise themselves.
        clock_is_sure: all packets were looked at to know that.
    """

    path: str
    track: int | None
    threads: int
    deadline: Deadline
    container: InputContainer = field(init=False)
    video: VideoStream | None = None
    video_decoder: VideoCodecContext | None = None
    audio: AudioStream | None = None
    origin: float = 0.0
    clock: RisingClock | None = None
    clock_is_sure: bool = False
    _files: ExitStack = field(default_factory=ExitStack)

    def open(self) -> None:
        """Open the file, or open it again at its beginning, and choose its tracks.

        Raises:
            MediaError: no_audio, where the given track does not exist. FFmpegError.
        """
        self.close()
        source = self._files.enter_context(_source(self.path))
        options = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
        self.container = self._files.enter_context(
            av.open(
                source,
                "r",
                container_options=options,
                metadata_errors="ignore",
                timeout=self.deadline.seconds,
            ),
        )
        self.video = video_track(self.container)
        self.audio = sound_track(self.path, self.container, self.track)
        self.video_decoder = None if self.video is None else decoder_of(self.video)
        sound_decoder = None if self.audio is None else self.audio.codec_context
        for decoder in (self.video_decoder, sound_decoder):
            if decoder is not None:
                decoder.thread_count = self.threads
                decoder.thread_type = "AUTO" if self.threads > 1 else "SLICE"
        # A negative start is codec delay, which the decoder removes: the clip itself starts at 0.
        self.origin = max(0.0, (self.container.start_time or 0) / av.time_base)

    def close(self) -> None:
        """Close the file."""
        self._files.close()

    def make_clock_rise(self) -> None:
        """Look at all packets of a file just opened, and make times rise that begin again."""
        self.clock = None
        self.clock_is_sure = True
        state = _state_of(self.path)
        if state not in _clocks:
            _clocks[state] = find_restarts(read_packets(self))
            if len(_clocks) > MOST_CLOCKS:
                _clocks.pop(next(iter(_clocks)))
        clock = _clocks.get(state)
        self.clock = clock and RisingClock(clock.stretches, clock.ends)

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
            raise MediaError(path, "undecodable", STILL) from error
        raise MediaError(path, "undecodable", _message(error)) from error


def _message(error: av.FFmpegError) -> str:
    """Return libav's message without the error's number and the path, which a MediaError has."""
    return f"libav: {error.strerror}" if error.strerror else str(error)


@contextmanager
def open_media(
    path: str | Path,
    timeout: float,
    threads: int = 1,
    track: int | None = None,
) -> Iterator[OpenMedia]:
    """Open a file for reading.

    Args:
        path: of the file.
        timeout: seconds that the load may take.
        threads: of each decoder.
        track: number of the sound track, from 0; None = the default one.

    Raises:
        MediaError: missing, zero_byte, undecodable, truncated, timeout, or no_audio for a track
            that does not exist; also for errors that are raised while the file is open.
    """
    require_file(path)
    if still_brand(path):
        raise MediaError(path, "undecodable", STILL)
    media = OpenMedia(str(path), track, threads, Deadline(path, timeout))
    with media_errors(path):
        try:
            media.open()
            cut = cut_box(path)
            if cut is not None and cut.kind == b"moov":  # libav would read the tracks that are left
                detail = f"{cut.missing} bytes of the header, at the end of the file, are missing"
                raise MediaError(path, "truncated", detail)
            if media.video is not None:
                check_size(path, media.video)
            if media.container.format.name in JOINABLE:
                media.make_clock_rise()
            yield media
        finally:
            media.close()


def require_file(path: str | Path) -> None:
    """Raise ``MediaError`` unless ``path`` is a readable file that is not empty."""
    size = size_of(path)
    if size is None:
        exists = os.path.exists(without_file_scheme(path))
        seen = "it is a folder, a pipe or a device" if exists else "no such file"
        raise MediaError(path, "missing", f"{seen}; check the path")
    if size == 0:
        raise MediaError(path, "zero_byte", "the file is empty")
    if byte_range_of(path) is None and not os.access(without_file_scheme(path), os.R_OK):
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
    """Go to the last key frame of a stream at or before a second of the file, or further back.

    The file may be opened again for it: tracks are to be taken from ``media`` afterwards.
    """
    if media.clock is not None:  # which the file's own times do not know
        media.clock.begin()
        media.open()
        return
    listen_to(media, stream)  # MPEG-TS seeks by the stream's packets, which must not be skipped
    try:
        media.container.seek(media.ticks(second, stream), stream=stream, backward=True)
    except av.error.PermissionError:
        _go_to_beginning(media, stream)


def _go_to_beginning(media: OpenMedia, stream: VideoStream | AudioStream) -> None:
    """Go to the beginning of a file that refuses to go back to a time.

    AVI and FLV refuse a time before their first packet, MPEG-PS any that it cannot find, and
    Matroska any that it has no index of. To read from the beginning is slower, and right as well.
    """
    try:
        media.container.seek(0, stream=stream)
    except (av.error.TimeoutError, av.error.ExitError):
        raise
    except av.FFmpegError:
        media.open()


def rewind(media: OpenMedia, stream: VideoStream | AudioStream) -> None:
    """Go to the very first packet of a stream; see :func:`seek`."""
    # 0 would skip the priming packets of a sound track, which lie before it.
    seek(media, stream, -1.0 - media.origin)


def read_packets(
    media: OpenMedia,
    stream: VideoStream | AudioStream | None = None,
) -> Iterator[Packet]:
    """Yield packets with data from the current position on, of one stream or of all.

    Raises:
        MediaError: timeout. TimeStepsBack: where it was not looked for before.
    """
    listen_to(media, stream)
    streams = () if stream is None else (stream,)
    clock = media.clock
    latest: dict[int, int] = {}  # decoding time by stream
    while True:
        try:
            for packet in media.container.demux(*streams):
                media.deadline.check()
                if not packet.size:
                    continue
                if clock is not None:
                    clock.put_right(packet)
                elif not media.clock_is_sure and packet.dts is not None:
                    _check_rise(packet, packet.dts, latest)
                yield packet
            return
        except IndexError:
            # PyAV raises it for a packet of a stream that the header did not announce: read on.
            media.deadline.check()


def _check_rise(packet: Packet, time: int, latest: dict[int, int]) -> None:
    """Raise ``TimeStepsBack`` when a packet's decoding time is well before its stream's latest."""
    before = latest.get(packet.stream_index)
    if before is None or time >= before:
        latest[packet.stream_index] = time
    elif float((before - time) * packet.time_base) > STEP_BACK:
        raise TimeStepsBack


def _source(path: str | Path) -> AbstractContextManager[Any]:
    """Return a plain file's name, which libav opens, or a Python file of other bytes."""
    file = repaired(path)
    if file is not None:
        return file
    name = f"file:{os.path.abspath(without_file_scheme(path))}"
    if byte_range_of(path) is None and is_utf8(name):
        return nullcontext(name)
    return open_bytes(path)
