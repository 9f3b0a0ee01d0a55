"""Read animated pictures that libav does not read, WebP and PNG, as films without sound."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from avllm.data.media.clip import Clip, Frames, MediaInfo, check_frames_fit
from avllm.data.media.container.length import check_duration, clip_interval
from avllm.data.media.errors import BROKEN_PICTURE, Deadline
from avllm.data.media.pictures.still import on_white, open_picture
from avllm.data.media.sampling import Sampling, centres
from avllm.data.media.window import TICK
from avllm.data.store.storage import open_bytes

STILL_SECONDS = 0.1  # of a frame that declares no time, as browsers show it


def is_animation(path: str | Path) -> bool:
    """Return whether a file is an animated WebP or PNG picture; False where it cannot be opened."""
    try:
        with open_bytes(path) as file:
            head = file.read(12)
            is_webp = head.startswith(b"RIFF") and head.endswith(b"WEBP")
            if not is_webp and not head.startswith(b"\x89PNG"):
                return False
            file.seek(0)
            with Image.open(file) as image:
                return bool(getattr(image, "is_animated", False))
    except (*BROKEN_PICTURE, Image.DecompressionBombError):
        return False


def read_animation(
    path: str | Path,
    start: float | None,
    end: float | None,
    sampling: Sampling | None,
    timeout: float,
) -> Clip:
    """Read the frames of an interval of an animation, each on the screen at its moment.

    Args:
        path: of the file.
        start: seconds of the file; None = its beginning.
        end: seconds of the file; None = its end.
        sampling: which frames; None = no frames.
        timeout: seconds.

    Raises:
        MediaError: undecodable, absurd_header, truncated, empty_interval, timeout.
    """
    deadline = Deadline(path, timeout)
    edges = _edges(path, deadline)
    first, last = clip_interval(path, edges[-1], start, end)
    if sampling is None:
        return Clip(None, None, last - first)
    with open_picture(path) as image:
        width, height = sampling.size(*image.size)
    check_frames_fit(path, sampling.count(last - first), width, height)
    spans = sampling.spans(last - first)
    steps_by_frame: dict[int, list[int]] = {}
    for step, centre in enumerate(centres(spans)):
        frame = bisect.bisect_right(edges, first + centre + TICK) - 1
        steps_by_frame.setdefault(min(frame, len(edges) - 2), []).append(step)
    x = _pictures(path, deadline, steps_by_frame, len(spans), sampling)
    span = torch.tensor(spans, dtype=torch.float32)
    return Clip(Frames(torch.from_numpy(x), span), None, last - first)


def probe_animation(path: str | Path, timeout: float) -> MediaInfo:
    """Return the size, the number of frames and the seconds of an animation.

    Raises:
        MediaError: undecodable, absurd_header, truncated, timeout.
    """
    edges = _edges(path, Deadline(path, timeout))
    with open_picture(path) as image:
        width, height = image.size
        name = (image.format or "").lower()
    return MediaInfo(
        duration=edges[-1],
        has_video=True,
        has_audio=False,
        width=width,
        height=height,
        fps=(len(edges) - 1) / edges[-1],
        num_frames=len(edges) - 1,
        video_codec=name,
        container=name,
        video_duration=edges[-1],
    )


def count_frames(path: str | Path, timeout: float) -> int:
    """Decode all frames of an animation, and return their number.

    Raises:
        MediaError: undecodable, absurd_header, truncated, timeout.
    """
    return len(_edges(path, Deadline(path, timeout))) - 1


def _frames(path: str | Path, deadline: Deadline) -> Iterator[Image.Image]:
    """Yield each frame, decoded; all are the same object."""
    with open_picture(path) as image:
        for number in itertools.count():
            deadline.check()
            try:
                image.seek(number)
            except EOFError:
                return
            image.load()
            yield image


def _edges(path: str | Path, deadline: Deadline) -> list[float]:
    """Return the seconds at which each frame begins, and the end of the last.

    Raises:
        MediaError: absurd_header, where the file is too small for its duration.
    """
    edges = [0.0]
    for image in _frames(path, deadline):
        seconds = float(image.info.get("duration") or 0) / 1000
        edges.append(edges[-1] + (seconds if seconds > 0 else STILL_SECONDS))
    check_duration(str(path), edges[-1])
    return edges


def _pictures(
    path: str | Path,
    deadline: Deadline,
    steps_by_frame: dict[int, list[int]],
    steps: int,
    sampling: Sampling,
) -> np.ndarray:
    """Return uint8 ``(T, H, W, 3)``, the frames with these numbers at their steps."""
    x: np.ndarray | None = None
    for number, image in enumerate(_frames(path, deadline)):
        if number not in steps_by_frame:
            continue
        width, height = sampling.size(*image.size)
        if x is None:
            x = np.empty((steps, height, width, 3), np.uint8)
        picture = Image.fromarray(on_white(image)).resize(
            (width, height), Image.Resampling.BILINEAR
        )
        x[steps_by_frame[number]] = np.asarray(picture)
    assert x is not None  # there is a frame at every moment
    return x
