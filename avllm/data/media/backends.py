"""Decode frames with decord or torchcodec, with the same result as PyAV.

PyAV with the packet selection of ``frames.py`` (``auto``) is the fastest of the three; the others
are for comparison, and for machines where it is not.

The time limit is checked after opening and after each frame. A process cannot interrupt its call
into a library: a call that hangs ends with its process, as in ``avllm data check``. Training reads
with PyAV, which checks the time between packets and lets libav interrupt a read that hangs.
"""

from __future__ import annotations

import bisect
import importlib.util
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from avllm.data.media.container.tracks import pixel_aspect
from avllm.data.media.errors import MediaError
from avllm.data.media.frames import first_frame, read_frames
from avllm.data.media.open import OpenMedia
from avllm.data.media.pictures.display import (
    display_matrix,
    displayed_size,
    is_transparent,
    mirrored,
)
from avllm.data.media.pictures.tone import is_high_dynamic_range
from avllm.data.media.sampling import Sampling
from avllm.data.media.window import TICK, Window, read_window
from avllm.data.store.storage import byte_range_of, open_bytes

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

BACKENDS = ("auto", "pyav", "decord", "torchcodec")


def read_with(
    backend: str,
    media: OpenMedia,
    moments: list[float],
    end: float,
    sampling: Sampling,
    threads: int,
) -> np.ndarray:
    """Return the frame on the screen at each moment, uint8 ``(T, H, W, 3)``.

    decord plays stream-copied cuts and open groups of pictures wrongly, does not mirror and has no
    AV1 decoder; such files are read by PyAV, and so are pictures that are not shown as they are
    stored, see :func:`is_plain`. decord turns rotated pictures itself.

    Args:
        backend: ``decord`` or ``torchcodec``.
        media: an open file with a video track.
        moments: seconds of the file, ascending.
        end: second of the file up to which there must be picture.
        sampling: gives the size.
        threads: of the decoder.

    Raises:
        MediaError: undecodable, truncated, timeout. ImportError: the back end is not installed.
    """
    if importlib.util.find_spec(backend) is None:
        raise ModuleNotFoundError(
            f"backend={backend!r} is not installed; run: pip install {backend}, or use 'auto'",
        )
    first = first_frame(media, read_window(media, 0.0, 0.0))
    if not is_plain(media, first):
        return read_frames(media, moments, end, sampling)
    if backend == "torchcodec":
        timestamps = [moment + media.origin for moment in moments]
        return _torchcodec(media, timestamps, sampling, threads)
    window = read_window(media, 0.0, math.inf)
    if not decord_is_right(media, window) or mirrored(display_matrix(first)):
        return read_frames(media, moments, end, sampling)
    # decord's timestamps are wrong where a track does not begin at 0; the packets' are right.
    seconds = [second for second, _ in window.displayed]
    indices = [max(0, bisect.bisect_right(seconds, moment + TICK) - 1) for moment in moments]
    size = sampling.size(*displayed_size(first, 1.0))
    return _decord(media, len(seconds), indices, size, threads)


def is_plain(media: OpenMedia, first: VideoFrame) -> bool:
    """Return whether pixels are square, progressive, opaque and not HDR, and times rise."""
    assert media.video is not None
    square = pixel_aspect(media.video) == 1.0
    opaque = not is_transparent(first.format.name)
    standard = not (first.interlaced_frame or is_high_dynamic_range(first))
    return square and opaque and standard and media.clock is None


def decord_is_right(media: OpenMedia, window: Window) -> bool:
    """Return whether decord gives this file's true frames; ``window`` is the whole file."""
    if media.video is None or media.video.codec_context.name in ("av1", "libdav1d"):
        return False
    if any(packet.is_discard for packet in window.packets):  # an edit list, which it ignores
        return False
    return window.timed and window.closed


def _decord(
    media: OpenMedia,
    length: int,
    indices: list[int],
    size: tuple[int, int],
    threads: int,
) -> np.ndarray:
    """Return the frames with these indices, of ``length`` frames in all."""
    import decord

    width, height = size
    pictures: dict[int, np.ndarray] = {}
    try:
        reader = decord.VideoReader(
            _source(media.path),
            num_threads=threads,
            width=width,
            height=height,
        )
        media.deadline.check()
        if len(reader) != length:
            seen = f"decord finds {len(reader)} frames; the container has {length}"
            raise MediaError(media.path, "undecodable", seen)
        for index in dict.fromkeys(indices):  # as fast as all at once: decord reads on
            pictures[index] = reader.get_batch([index]).asnumpy()  # (1, H, W, 3)
            media.deadline.check()
    except decord.DECORDError as error:
        raise MediaError(media.path, "undecodable", f"decord: {error}") from error
    return np.concatenate([pictures[index] for index in indices])


def _torchcodec(
    media: OpenMedia,
    seconds: list[float],
    sampling: Sampling,
    threads: int,
) -> np.ndarray:
    """Return the frames displayed at these timestamps, in seconds."""
    from torchcodec.decoders import VideoDecoder

    pictures: list[torch.Tensor] = []
    try:
        decoder = VideoDecoder(
            _source(media.path),
            dimension_order="NHWC",
            num_ffmpeg_threads=threads,
            seek_mode="exact",
        )
        first = decoder.metadata.begin_stream_seconds or 0.0
        last = decoder.metadata.end_stream_seconds or math.inf
        for second in seconds:
            media.deadline.check()
            inside = min(max(second + TICK, first), last - TICK)
            frames = decoder.get_frames_played_at([inside])
            pictures.append(_resize(frames.data, sampling))  # (1, H, W, 3)
        media.deadline.check()
    except RuntimeError as error:
        if "Could not load libtorchcodec" in str(error):
            raise ImportError(
                "backend='torchcodec' needs FFmpeg libraries; install FFmpeg, or use 'auto'",
            ) from None
        raise MediaError(media.path, "undecodable", f"torchcodec: {error}") from error
    return torch.cat(pictures).numpy()


def _source(path: str) -> Any:
    """Return a plain file's name, or an open file for a member of a shard or a URL."""
    return path if byte_range_of(path) is None else open_bytes(path)


def _resize(x: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    width, height = sampling.size(x.shape[2], x.shape[1])
    if (width, height) == (x.shape[2], x.shape[1]):
        return x
    planes = x.permute(0, 3, 1, 2)  # (T, 3, H, W)
    planes = torch.nn.functional.interpolate(
        planes,
        (height, width),
        mode="bilinear",
        antialias=True,
    )
    return planes.permute(0, 2, 3, 1).contiguous()  # (T, H, W, 3)
