"""Bring pictures of more than 8 bits to 8: 10, 12 or 14 bits are often kept in files of 16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from avllm.data.media.clip import Note
from avllm.data.media.errors import MediaError
from avllm.data.store.storage import open_bytes

DEPTHS = (8, 10, 12, 14, 16, 24, 32)  # bits of a value
OUTLIERS = 0.001  # share of values that may be above a depth: single pixels of a sensor are hot
DARK = 64  # Pillow reads the upper 8 of 16 bits of a colour; below this a few may be unused
BITS_PER_SAMPLE = 258  # tag of TIFF
FORMATS = {"PNG": "png_pipe", "TIFF": "tiff_pipe"}


def has_deep_values(image: Image.Image) -> bool:
    """Return whether Pillow gives a picture's values with more than 8 bits: grey ones alone."""
    return image.mode.startswith("I") or image.mode == "F"


def to_8_bits(path: str | Path, values: np.ndarray, notes: list[Note]) -> np.ndarray:
    """Return values of more than 8 bits as uint8, by the depth that they use.

    Args:
        path: of the file, for errors.
        values: integers or floats of any shape.
        notes: is added to where the depth is not the type's own.

    Raises:
        MediaError: bad_values, where floats are not finite.
    """
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise MediaError(path, "bad_values", "the picture has values that are not finite")
    if not values.size:
        return values.astype(np.uint8)
    if values.dtype.kind == "f" and float(values.max()) <= 1.0:
        return (values.clip(0, 1) * 255).round().astype(np.uint8)
    position = int((1 - OUTLIERS) * (values.size - 1))
    top = float(np.partition(values, position, axis=None)[position])
    bits = next((bits for bits in DEPTHS if top < 2**bits), DEPTHS[-1])
    if bits != 16 and (values.dtype.kind != "f" or bits != 8):
        notes.append(Note("value_range", f"its values reach {top:g}: read as {bits} bits"))
    return (values / 2.0 ** (bits - 8)).clip(0, 255).astype(np.uint8)


def deep_colours(path: str | Path, image: Image.Image, notes: list[Note]) -> Image.Image | None:
    """Return a dark colour picture of 16 bits with its true range; None for any other.

    Pillow reads the upper 8 bits of each value, and libav all 16.
    """
    if image.mode not in ("RGB", "RGBA", "LA") or not _has_16_bits(path, image):
        return None
    colours = image.getextrema()
    bands = [colours[0]] if image.mode == "LA" else colours[:3]
    if max(band[1] for band in bands) >= DARK:  # type: ignore[index]
        return None
    try:
        with (
            open_bytes(path) as file,
            av.open(file, "r", format=FORMATS[image.format or ""]) as container,
        ):
            frame = next(iter(container.decode(video=0)))
            deep: np.ndarray = frame.reformat(format="rgba64le").to_ndarray()  # (H, W, 4)
    except (av.FFmpegError, StopIteration, ValueError):
        notes.append(Note("value_range", "only the upper 8 of its 16 bits can be read"))
        return None
    colour = to_8_bits(path, deep[..., :3], notes)
    alpha = (deep[..., 3:] >> 8).astype(np.uint8)
    return Image.fromarray(np.concatenate([colour, alpha], -1))


def _has_16_bits(path: str | Path, image: Image.Image) -> bool:
    if image.format == "PNG":
        with open_bytes(path) as file:
            return file.read(25)[24:] == b"\x10"
    tags: Any = getattr(image, "tag_v2", {})
    return image.format == "TIFF" and 16 in tags.get(BITS_PER_SAMPLE, ())
