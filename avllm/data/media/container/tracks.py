"""Choose the tracks of a file that are read, and refuse pictures of absurd size."""

from __future__ import annotations

from pathlib import Path

from av.audio.stream import AudioStream
from av.codec import CodecContext
from av.container import InputContainer
from av.stream import Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.stream import VideoStream

from avllm.data.media.errors import MediaError

MAX_SIDE = 16_384  # pixels; a header that declares more is refused before anything is allocated
MAX_PIXELS = 8_192 * 8_192
MIN_RATE = 1_000  # samples a second of a track
MAX_RATE = 1_000_000
# libav's decoders for VP8 and VP9 leave out the transparency, which is a second picture.
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
MAX_STRETCH = 8.0  # by which a pixel may be wider than high, or higher than wide


def video_track(container: InputContainer) -> VideoStream | None:
    """Return the video track that is shown: the default one, else the first; None without one.

    The cover picture of a sound file is no video track.
    """
    tracks = [stream for stream in container.streams.video if not _is_cover(stream)]
    return next((track for track in tracks if _is_default(track)), tracks[0] if tracks else None)


def sound_tracks(container: InputContainer) -> list[AudioStream]:
    """Return the sound tracks that can be decoded, in the order of the file."""
    return [stream for stream in container.streams.audio if stream.codec_context is not None]


def sound_track(
    path: str | Path,
    container: InputContainer,
    track: int | None,
) -> AudioStream | None:
    """Return the sound track with a number, or the one that is heard without one.

    That is the default track, else the first that is no comment, else the first.

    Args:
        path: of the file, for errors.
        container: the open file.
        track: number of the sound track, from 0.

    Raises:
        MediaError: no_audio, where there is no track with this number.
    """
    tracks = sound_tracks(container)
    if track is not None:
        if track < len(tracks):
            return tracks[track]
        seen = f"track={track}, and the file has {len(tracks)} sound tracks, numbered from 0"
        raise MediaError(path, "no_audio", seen)
    for choose in (_is_default, _is_no_comment):
        chosen = next((stream for stream in tracks if choose(stream)), None)
        if chosen is not None:
            return chosen
    return tracks[0] if tracks else None


def _is_default(stream: VideoStream | AudioStream) -> bool:
    return Disposition.default in stream.disposition


def _is_no_comment(stream: AudioStream) -> bool:
    return Disposition.comment not in stream.disposition


def _is_cover(stream: VideoStream) -> bool:
    """Return whether a stream is the cover picture of a sound file, or has no decoder."""
    return stream.codec_context is None or Disposition.attached_pic in stream.disposition


def check_size(path: str | Path, video: VideoStream) -> None:
    """Refuse pictures of a size that no camera makes.

    Raises:
        MediaError: absurd_header, or undecodable where the size is 0.
    """
    width, height = video.codec_context.width, video.codec_context.height
    seen = f"the header declares a picture of {width}x{height} pixels"
    if width <= 0 or height <= 0:
        raise MediaError(path, "undecodable", seen)
    aspect = pixel_aspect(video)
    if not 1 / MAX_STRETCH <= aspect <= MAX_STRETCH:
        raise MediaError(path, "absurd_header", f"{seen}, each {aspect:g} times as wide as high")
    width = round(width * aspect)
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        detail = f"{seen}; the limit is {MAX_SIDE} a side and {MAX_PIXELS} in all"
        raise MediaError(path, "absurd_header", detail)


def check_rate(path: str | Path, rate: int) -> None:
    """Refuse absurd sampling rates, whose resampling would take all memory.

    Raises:
        MediaError: absurd_header.
    """
    if not MIN_RATE <= rate <= MAX_RATE:
        seen = f"the header declares {rate} samples a second; expected {MIN_RATE} to {MAX_RATE}"
        raise MediaError(path, "absurd_header", seen)


def decoder_of(video: VideoStream) -> VideoCodecContext:
    """Return the decoder of a video track: one that gives the transparency which is beside VP9."""
    name = ALPHA_DECODERS.get(video.codec_context.name)
    if name is None or video.metadata.get("alpha_mode") != "1":
        return video.codec_context
    decoder = CodecContext.create(name, "r")
    assert isinstance(decoder, VideoCodecContext)
    return decoder


def pixel_aspect(video: VideoStream) -> float:
    """Return how many times a stored pixel is as wide as high; 1 where the file does not say."""
    aspect = video.sample_aspect_ratio
    return float(aspect) if aspect else 1.0
