"""Show pictures as a player does: turned, mirrored, without combs, transparent parts white."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from av.filter import Graph
from av.video.format import VideoFormat

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

FIELD_BASE = Fraction(1, 1000)  # time base of frames that have none; the field's time is not read


def colours_of(frame: VideoFrame) -> list[np.ndarray]:
    """Return red, green and blue ``(H, W)`` of a ``gbrp``, ``gbrap`` or ``rgb24`` frame.

    They are views, except where there is transparency, which becomes white.
    """
    height, width = frame.height, frame.width
    # Each plane as (lines, bytes of a line), padding at the end of a line included.
    planes = []
    buffer: Any
    for buffer in frame.planes:
        content = np.frombuffer(buffer, np.uint8)
        planes.append(content.reshape(-1, buffer.line_size))
    if frame.format.name == "rgb24":
        pixels = planes[0][:height, : 3 * width].reshape(height, width, 3)
        return [pixels[:, :, channel] for channel in range(3)]
    green, blue, red, *alpha = (plane[:height, :width] for plane in planes)
    if not alpha:
        return [red, green, blue]
    return [_on_white(colour, alpha[0]) for colour in (red, green, blue)]


def _on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Return a colour ``(H, W)`` over white; 0 in ``alpha`` is transparent, 255 is not."""
    missing = (255 - colour).astype(np.uint16)
    return (255 - (missing * alpha + 127) // 255).astype(np.uint8)


@lru_cache(maxsize=64)
def is_transparent(pixel_format: str) -> bool:
    """Return whether pixels of this format of libav may be transparent; a palette's may."""
    pixels = VideoFormat(pixel_format)
    return pixels.has_palette or any(component.is_alpha for component in pixels.components)


@dataclass
class FieldFilter:
    """Take one field out of interlaced frames: every second line of each plane.

    Both fields were recorded at different moments, so that what moves has combs in a whole frame.

    Attributes:
        kind: width, height and pixel format that the graph is made for.
        graph: of libav; None before the first frame.
    """

    kind: tuple[int, int, str] | None = None
    graph: Graph | None = None

    def __call__(self, frame: VideoFrame) -> VideoFrame:
        """Return the upper field, of half the height."""
        kind = (frame.width, frame.height, frame.format.name)
        if self.graph is None or kind != self.kind:
            graph = Graph()
            source = graph.add_buffer(
                width=frame.width,
                height=frame.height,
                format=frame.format,
                time_base=frame.time_base or FIELD_BASE,
            )
            field = graph.add("field", "type=top")
            sink = graph.add("buffersink")
            source.link_to(field)
            field.link_to(sink)
            graph.configure()
            self.graph = graph
            self.kind = kind
        self.graph.push(frame)
        upper: Any = self.graph.pull()
        return upper


def display_matrix(frame: VideoFrame) -> np.ndarray | None:
    """Return the container's 3x3 display matrix, or None."""
    data: Any = frame.side_data.get("DISPLAYMATRIX")
    return None if data is None else np.frombuffer(data, np.int32).reshape(3, 3)


def orient(picture: np.ndarray, matrix: np.ndarray | None) -> np.ndarray:
    """Turn and mirror a picture ``(H, W)`` or ``(H, W, 3)`` by its display matrix.

    Only multiples of a right angle are applied.
    """
    if matrix is None:
        return picture
    swapped = abs(int(matrix[0, 0])) < abs(int(matrix[0, 1]))
    if swapped:
        picture = picture.swapaxes(0, 1)
        x_sign, y_sign = matrix[1, 0], matrix[0, 1]
    else:
        x_sign, y_sign = matrix[0, 0], matrix[1, 1]
    if x_sign < 0:
        picture = picture[:, ::-1]
    if y_sign < 0:
        picture = picture[::-1]
    return picture


def rotation(matrix: np.ndarray | None) -> int:
    """Return the clockwise turn (0, 90, 180, 270 degrees) that displays a stored picture."""
    if matrix is None:
        return 0
    angle = np.degrees(np.arctan2(float(matrix[0, 1]), float(matrix[0, 0])))
    return round(float(angle)) % 360


def mirrored(matrix: np.ndarray | None) -> bool:
    """Return whether the stored picture is mirrored for display.

    The matrix has a negative determinant then.
    """
    return matrix is not None and float(np.linalg.det(matrix[:2, :2].astype(float))) < 0


def displayed_size(frame: VideoFrame, aspect: float) -> tuple[int, int]:
    """Return width and height in square pixels, after rotation.

    Args:
        frame: as stored.
        aspect: how many times a stored pixel is as wide as high.
    """
    width = max(1, round(frame.width * aspect))
    upright = rotation(display_matrix(frame)) % 180 == 0
    return (width, frame.height) if upright else (frame.height, width)
