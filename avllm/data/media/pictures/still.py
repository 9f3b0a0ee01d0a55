"""Read a still picture: turned upright, on white, with the range that its values use."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from avllm.data.media.clip import Clip, Frames, Note
from avllm.data.media.container.mp4_boxes import still_brand
from avllm.data.media.container.tracks import MAX_PIXELS
from avllm.data.media.errors import BROKEN_PICTURE, MediaError
from avllm.data.media.open import require_file
from avllm.data.media.pictures.depth import deep_colours, has_deep_values, to_8_bits
from avllm.data.store.storage import open_bytes

ORIENTATION = 0x0112  # tag of EXIF
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(path: str | Path) -> Clip:
    """Read a still image as a clip of one frame, with ``span`` [[0, 0]] and duration 0.

    It is turned as its EXIF data say. Transparent pixels become white. Animations give their first
    frame. Values of more than 8 bits are read by the range that they use.

    Raises:
        MediaError: missing, zero_byte, undecodable, absurd_header, truncated, bad_values.
    """
    require_file(path)
    notes: list[Note] = []
    with open_picture(path) as image:
        if getattr(image, "is_animated", False):
            seen = f"the first of {getattr(image, 'n_frames', 1)} pictures is read"
            notes.append(Note("animation", f"{seen}; as a video, all are"))
        pixels = _rgb(path, image, notes)
    x = torch.from_numpy(pixels)[None]  # (1, H, W, 3)
    return Clip(Frames(x, torch.zeros(1, 2)), None, 0.0, notes=tuple(notes))


@contextmanager
def open_picture(path: str | Path) -> Iterator[Image.Image]:
    """Open a picture with Pillow, and map its exceptions to ``MediaError``.

    Raises:
        MediaError: undecodable, absurd_header, truncated.
    """
    brand = still_brand(path)
    if brand:
        _register_heic_reader()
    try:
        with open_bytes(path) as file, Image.open(file) as image:
            if image.width * image.height > MAX_PIXELS:
                seen = f"{image.width}x{image.height} pixels; the limit is {MAX_PIXELS} in all"
                raise MediaError(path, "absurd_header", seen)
            yield image
    except MediaError:
        raise
    except Image.DecompressionBombError as error:
        least = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        seen = f"more than {least:,} pixels; the limit is {MAX_PIXELS:,}"
        raise MediaError(path, "absurd_header", f"the header declares {seen}") from error
    except UnidentifiedImageError as error:
        detail = "it is no picture of a format that Pillow reads"
        if brand:
            detail = f"a picture of kind {brand} needs a reader; run: pip install pillow-heif"
        raise MediaError(path, "undecodable", detail) from error
    except BROKEN_PICTURE as error:
        reason = "truncated" if "truncated" in str(error).lower() else "undecodable"
        raise MediaError(path, reason, str(error)) from error


def _register_heic_reader() -> None:
    """Let Pillow read HEIC where the package for it is installed."""
    if importlib.util.find_spec("pillow_heif") is None:
        return
    pillow_heif: Any = importlib.import_module("pillow_heif")
    pillow_heif.register_heif_opener()


def _rgb(path: str | Path, image: Image.Image, notes: list[Note]) -> np.ndarray:
    """Return the pixels ``(H, W, 3)`` of an image of any mode, upright."""
    if has_deep_values(image):
        upright = ImageOps.exif_transpose(image)
        grey = to_8_bits(path, np.asarray(upright), notes)
        return np.repeat(grey[..., None], 3, -1)  # (H, W, 3)
    deep = deep_colours(path, image, notes)
    if deep is None:
        return on_white(ImageOps.exif_transpose(image))
    turn = UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    return on_white(deep if turn is None else deep.transpose(turn))


def on_white(image: Image.Image) -> np.ndarray:
    """Return the pixels ``(H, W, 3)`` of an image of 8 bits, its transparent parts white."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.array(image.convert("RGB"))  # (H, W, 3)
