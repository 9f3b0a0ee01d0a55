"""Every packet of a file decoded: what a check finds that reads more than training would."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import av

from avllm.data.media.open import MediaError, OpenMedia, open_media, read_packets


@dataclass(frozen=True)
class Whole:
    """What decoding a whole file gave: frames of the picture, seconds of sound, and packets (all, and the broken)."""

    frames: int
    sound_seconds: float
    packets: int
    broken: int


def decode_whole(path: str | Path, timeout: float = 60.0) -> Whole:
    """Decode all packets of the picture and of the sound; holds one frame at a time.

    Raises:
        MediaError: the file cannot be opened, or the time is over.
    """
    with open_media(path, timeout) as media:
        return _decode(media)


def _decode(media: OpenMedia) -> Whole:
    streams = {s.index: s for s in (media.video, media.audio) if s is not None}
    frames, seconds, packets, broken = 0, 0.0, 0, 0
    for packet in read_packets(media):
        if packet.stream_index not in streams:
            continue
        packets += 1
        try:
            decoded = packet.decode()
        except av.error.InvalidDataError:
            broken += 1
            continue
        broken += packet.is_corrupt or any(_is_corrupt(frame) for frame in decoded)
        frames, seconds = _count(decoded, frames, seconds)
    for stream in streams.values():
        frames, seconds = _count(stream.codec_context.decode(None), frames, seconds)
    if media.video is not None and not frames:
        raise MediaError(media.path, "undecodable", f"none of {packets} packets gave a frame")
    return Whole(frames, seconds, packets, broken)


def _is_corrupt(frame: object) -> bool:
    return bool(getattr(frame, "is_corrupt", False))


def _count(decoded: object, frames: int, seconds: float) -> tuple[int, float]:
    for frame in decoded:  # type: ignore[attr-defined]
        if isinstance(frame, av.VideoFrame):
            frames += 1
        else:
            seconds += frame.samples / frame.sample_rate
    return frames, seconds
