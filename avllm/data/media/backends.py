"""Other decoders for the frames, with the same result: decord and torchcodec.

PyAV with the packet selection of ``media_frames.py`` is the faster one of the three (``auto``); these are for
comparison, and for machines where they are not.

The time-out is looked at after opening and after each frame. No process can break off its own call into a library: what
hangs there ends with its process, as in ``avllm data check`` (``check_workers.py``). Training reads with PyAV, which
looks at the time between packets and lets libav itself break off a read that hangs.
"""

from __future__ import annotations

import bisect
import importlib.util
import math
from typing import Any

import numpy as np
import torch

from avllm.data.media.frames import (
    TICK,
    Window,
    display_matrix,
    displayed_size,
    first_frame,
    mirrored,
    read_frames,
    read_window,
)
from avllm.data.media.open import MediaError, OpenMedia
from avllm.data.media.sampling import Sampling
from avllm.data.store.storage import byte_range_of, open_bytes

BACKENDS = ("auto", "pyav", "decord", "torchcodec")


def read_with(
    backend: str, media: OpenMedia, moments: list[float], end: float, sampling: Sampling, threads: int
) -> np.ndarray:
    """The frame on the screen at each moment (seconds of the file), uint8 ``(T, H, W, 3)``, by another decoder.

    decord plays stream-copied cuts and open groups of pictures wrongly, does not mirror and has no AV1 decoder; such
    files are read by PyAV. It turns rotated pictures by itself.
    """
    if importlib.util.find_spec(backend) is None:
        raise ModuleNotFoundError(f"backend={backend!r} is not installed; expected: pip install {backend}, or 'auto'")
    if backend == "torchcodec":
        return _torchcodec(media, [moment + media.origin for moment in moments], sampling, threads)
    window = read_window(media, 0.0, math.inf)
    if not decord_is_right(media, window):
        return read_frames(media, moments, end, sampling)
    shown = first_frame(media, window)
    if mirrored(display_matrix(shown)):
        return read_frames(media, moments, end, sampling)
    # decord's own timestamps are wrong where a track does not begin at 0; the packets' are not.
    seconds = [second for second, _ in window.displayed()]
    indices = [max(0, bisect.bisect_right(seconds, moment + TICK) - 1) for moment in moments]
    width, height = displayed_size(shown)
    return _decord(media, len(seconds), indices, sampling.size(width, height), threads)


def decord_is_right(media: OpenMedia, window: Window) -> bool:
    """Whether decord gives this file's true frames; ``window`` is the whole file."""
    blind = media.video is None or media.video.codec_context.name in ("av1", "libdav1d")
    return not blind and window.timed and not any(packet.is_discard for packet in window.packets) and window.closed


def _decord(media: OpenMedia, length: int, indices: list[int], size: tuple[int, int], threads: int) -> np.ndarray:
    import decord

    pictures: dict[int, np.ndarray] = {}
    try:
        reader = decord.VideoReader(_source(media.path), num_threads=threads, width=size[0], height=size[1])
        media.deadline.check()
        if len(reader) != length:
            seen = f"decord finds {len(reader)} frames; the container has {length}"
            raise MediaError(media.path, "undecodable", seen)
        for index in dict.fromkeys(indices):  # one by one is as fast as all at once: it goes on where it stands
            pictures[index] = reader.get_batch([index]).asnumpy()  # (1, H, W, 3)
            media.deadline.check()
    except decord.DECORDError as error:
        raise MediaError(media.path, "undecodable", f"decord: {error}") from error
    return np.concatenate([pictures[index] for index in indices])


def _torchcodec(media: OpenMedia, seconds: list[float], sampling: Sampling, threads: int) -> np.ndarray:
    from torchcodec.decoders import VideoDecoder

    pictures: list[torch.Tensor] = []
    try:
        decoder = VideoDecoder(
            _source(media.path), dimension_order="NHWC", num_ffmpeg_threads=threads, seek_mode="exact"
        )
        first = decoder.metadata.begin_stream_seconds or 0.0
        last = decoder.metadata.end_stream_seconds or math.inf
        for second in seconds:
            media.deadline.check()
            inside = min(max(second + TICK, first), last - TICK)
            pictures.append(_resize(decoder.get_frames_played_at([inside]).data, sampling))  # (1, H, W, 3)
        media.deadline.check()
    except RuntimeError as error:
        if "Could not load libtorchcodec" in str(error):
            raise ImportError("backend='torchcodec' found no FFmpeg libraries; install FFmpeg, or use 'auto'") from None
        raise MediaError(media.path, "undecodable", f"torchcodec: {error}") from error
    return torch.cat(pictures).numpy()


def _source(path: str) -> Any:
    """What the decoder is given: a plain file by its name, what lies in a shard or behind a URL as an open file."""
    return path if byte_range_of(path) is None else open_bytes(path)


def _resize(x: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    width, height = sampling.size(x.shape[2], x.shape[1])
    if (width, height) == (x.shape[2], x.shape[1]):
        return x
    planes = x.permute(0, 3, 1, 2)  # (T, 3, H, W)
    planes = torch.nn.functional.interpolate(planes, (height, width), mode="bilinear", antialias=True)
    return planes.permute(0, 2, 3, 1).contiguous()  # (T, H, W, 3)
