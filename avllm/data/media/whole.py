"""Decode every packet of a file, for checks that read more than training does."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av

from avllm.data.media.container.reread import reading
from avllm.data.media.errors import MediaError
from avllm.data.media.open import OpenMedia, open_media, read_packets, require_file, rewind
from avllm.data.media.pictures.animation import count_frames, is_animation


@dataclass
class WholeFile:
    """Count what decoding a whole file gave.

    Attributes:
        frames: of the picture.
        sound_seconds: of the sound.
        packets: of both.
        broken: packets that cannot be decoded, or give corrupt frames.
    """

    frames: int = 0
    sound_seconds: float = 0.0
    packets: int = 0
    broken: int = 0

    def add(self, frames: Iterable[Any]) -> None:
        """Count decoded frames of the picture or of the sound."""
        for frame in frames:
            if isinstance(frame, av.VideoFrame):
                self.frames += 1
            else:
                self.sound_seconds += frame.samples / frame.sample_rate


def decode_whole(path: str | Path, timeout: float = 60.0) -> WholeFile:
    """Decode all packets of the picture and of the sound, holding one frame at a time.

    Raises:
        MediaError: the file cannot be opened, or the time is over.
    """
    require_file(path)
    if is_animation(path):
        return WholeFile(frames=count_frames(path, timeout))
    with open_media(path, timeout) as media:
        return reading(media, _decode)


def _decode(media: OpenMedia) -> WholeFile:
    stream = media.video or media.audio
    if stream is not None:
        rewind(media, stream)
    streams = {s.index: s for s in (media.video, media.audio) if s is not None}
    counts = WholeFile()
    for packet in read_packets(media):
        if packet.stream_index not in streams:
            continue
        counts.packets += 1
        try:
            frames = packet.decode()
        except av.error.InvalidDataError:
            counts.broken += 1
            continue
        if packet.is_corrupt or any(_is_corrupt(frame) for frame in frames):
            counts.broken += 1
        counts.add(frames)
    for stream in streams.values():
        counts.add(stream.codec_context.decode(None))
    if media.video is not None and not counts.frames:
        detail = f"none of {counts.packets} packets gave a frame"
        raise MediaError(media.path, "undecodable", detail)
    return counts


def _is_corrupt(frame: object) -> bool:
    return bool(getattr(frame, "is_corrupt", False))
