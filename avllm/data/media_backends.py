"""Other decoders for the frames, with the same result: decord and torchcodec.

PyAV with the packet selection of ``media_frames.py`` is the faster one of the three (``auto``); these are for
comparison, and for machines where they are not.
"""

from __future__ import annotations

import importlib.util

import numpy as np
import torch

from avllm.data.media_frames import TICK, display_matrix, first_frame, orient, read_frames, read_window
from avllm.data.media_open import MediaError, OpenMedia
from avllm.data.sampling import Sampling

BACKENDS = ("auto", "pyav", "decord", "torchcodec")


def read_with(
    backend: str, media: OpenMedia, moments: list[float], end: float, sampling: Sampling, threads: int
) -> np.ndarray:
    """The frame on the screen at each moment (seconds of the file), uint8 ``(T, H, W, 3)``, by another decoder.

    decord plays stream-copied cuts wrongly and has no AV1 decoder; such files are read by PyAV.
    """
    if importlib.util.find_spec(backend) is None:
        raise ModuleNotFoundError(f"backend={backend!r} is not installed; expected: pip install {backend}, or 'auto'")
    window = read_window(media, 0.0, 0.0)
    if backend == "decord" and not decord_is_right(media, window.cut):
        return read_frames(media, moments, end, sampling)
    frame = first_frame(media, window)
    size = sampling.size(frame.width, frame.height)
    seconds = [moment + media.origin for moment in moments]
    if backend == "decord":
        pictures = _decord(media.path, seconds, size, threads)
        matrix = display_matrix(frame)
        return np.ascontiguousarray(np.stack([orient(picture, matrix) for picture in pictures]))
    return _torchcodec(media.path, seconds, sampling, threads)


def decord_is_right(media: OpenMedia, cut: bool) -> bool:
    """Whether decord gives this file's true frames."""
    return media.video is not None and not cut and media.video.codec_context.name not in ("av1", "libdav1d")


def _decord(path: str, seconds: list[float], size: tuple[int, int], threads: int) -> np.ndarray:
    import decord

    try:
        reader = decord.VideoReader(path, num_threads=threads, width=size[0], height=size[1])
        begins = reader.get_frame_timestamp(range(len(reader)))[:, 0]
        at = np.searchsorted(begins, np.asarray(seconds) + TICK, side="right") - 1
        return reader.get_batch(at.clip(0)).asnumpy()
    except decord.DECORDError as error:
        raise MediaError(path, "undecodable", f"decord: {error}") from error


def _torchcodec(path: str, seconds: list[float], sampling: Sampling, threads: int) -> np.ndarray:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=threads, seek_mode="exact")
    first, last = decoder.metadata.begin_stream_seconds, decoder.metadata.end_stream_seconds
    inside = [min(max(second + TICK, first), last - TICK) for second in seconds]
    pictures = decoder.get_frames_played_at(inside).data  # (T, H, W, 3)
    return _resize(pictures, sampling).numpy()


def _resize(x: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    width, height = sampling.size(x.shape[2], x.shape[1])
    if (width, height) == (x.shape[2], x.shape[1]):
        return x
    planes = x.permute(0, 3, 1, 2)  # (T, 3, H, W)
    planes = torch.nn.functional.interpolate(planes, (height, width), mode="bilinear", antialias=True)
    return planes.permute(0, 2, 3, 1).contiguous()  # (T, H, W, 3)
