"""Turn and mirror pictures as their container says (ISO 14496-12)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from av.video.frame import VideoFrame


def colours_of(frame: VideoFrame) -> list[np.ndarray]:
    """Return red, green and blue ``(H, W)`` of a ``gbrp`` or ``rgb24`` frame, as views."""
    height, width = frame.height, frame.width
    # Each plane as (lines, bytes of a line), padding at the end of a line included.
    planes = []
    for plane in frame.planes:
        content = np.frombuffer(memoryview(plane), np.uint8)
        planes.append(content.reshape(-1, plane.line_size))
    if frame.format.name == "gbrp":
        green, blue, red = (plane[:height, :width] for plane in planes)
        return [red, green, blue]
    pixels = planes[0][:height, : 3 * width].reshape(height, width, 3)
    return [pixels[:, :, channel] for channel in range(3)]


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


def displayed_size(frame: VideoFrame) -> tuple[int, int]:
    """Return width and height after rotation."""
    upright = rotation(display_matrix(frame)) % 180 == 0
    return (frame.width, frame.height) if upright else (frame.height, frame.width)
