"""One media part of a row -> its clip: which loader reads it, and with which track."""

from __future__ import annotations

from pathlib import Path

from avllm.data.media import Clip, Sampling, load_audio, load_image, load_video
from avllm.data.schema import AudioPart, ImagePart, MediaPart, resolve


def load_part(
    part: MediaPart, root: Path | None, *, sampling: Sampling | None, rate: int | None, timeout: float = 60.0
) -> Clip:
    """Decode one media part.

    Args:
        part: which file and interval.
        root: the folder that a relative path is relative to.
        sampling: which frames of a video; None = no frames.
        rate: samples a second of the sound; None = a video's sound is not read.
        timeout: seconds.

    Raises:
        MediaError: with the reason. ValueError: an audio part and no rate.
    """
    path = resolve(part, root)
    if isinstance(part, ImagePart):
        return load_image(path)
    if isinstance(part, AudioPart):
        if rate is None:
            raise ValueError(f"{path} is to be heard, but rate is None; expected samples a second")
        return load_audio(path, rate=rate, start=part.start, end=part.end, timeout=timeout)
    return load_video(
        path,
        start=part.start,
        end=part.end,
        sampling=sampling,
        rate=None if part.sound == "off" else rate,
        sound=part.sound,
        timeout=timeout,
    )
