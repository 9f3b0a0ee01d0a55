"""Compute which tokens of a grid the boxes of regions cover, for parts that read regions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from avllm.errors import UserError
from avllm.tokens import PICTURE_SIZE, REGION_BOXES, REGION_MARKS, REGION_MASK


def coverage(extra: Mapping[str, Tensor], tokens: int) -> Tensor:
    """Return the share of each token's patch that each box covers, ``(B, T, K, P)``.

    Args:
        extra: side information of a batch with regions.
        tokens: P, the patches of a step, row by row.

    Raises:
        UserError: ``no_grid``: so many patches are no grid of the pictures' form.
    """
    boxes = extra[REGION_BOXES]  # (B, T, K, 4)
    size = extra[PICTURE_SIZE].amax((0, 1)).clamp(min=1)  # (2,) height and width
    height, width = (int(side) for side in size)
    rows = max(1, round((tokens * height / width) ** 0.5))
    columns = tokens // rows
    if rows * columns != tokens:
        raise UserError(
            f"{tokens} tokens a step are no grid of patches of {height} x {width} pixels; regions "
            "need the patches of a picture in their places, before what packs or pools",
            reason="no_grid",
        )
    across = _overlap(boxes[..., 0], boxes[..., 2], columns, width)  # (B, T, K, columns)
    down = _overlap(boxes[..., 1], boxes[..., 3], rows, height)  # (B, T, K, rows)
    share = (down.unsqueeze(-1) * across.unsqueeze(-2)).flatten(-2)  # (B, T, K, P)
    return share * extra[REGION_MASK].unsqueeze(-1)


def _overlap(low: Tensor, high: Tensor, parts: int, length: int) -> Tensor:
    """Return the share of each of ``parts`` equal stretches of a side that lies from low to high.

    Args:
        low, high: ``(...)`` pixels. parts: n. length: of the side, in pixels.

    Returns:
        ``(..., n)`` from 0 to 1.
    """
    stretch = length / parts
    start = torch.arange(parts, device=low.device) * stretch  # (n,)
    covered = torch.minimum(high.unsqueeze(-1), start + stretch)
    covered = covered - torch.maximum(low.unsqueeze(-1), start)
    return covered.clamp(min=0) / stretch


def marks_of(extra: Mapping[str, Tensor]) -> Tensor:
    """Return the number of each box's mark, ``(B, K)`` long."""
    b, _, k = extra[REGION_MASK].shape
    in_order = torch.arange(k, device=extra[REGION_MASK].device).expand(b, k)
    if REGION_MARKS not in extra:
        return in_order
    given = extra[REGION_MARKS][:, 0]  # (B, K), 0 in clips that bring no marks, and in padding
    brings = given.any(1, keepdim=True)
    return torch.where(brings, (given - 1).clamp(min=0), in_order)


def first_steps(extra: Mapping[str, Tensor]) -> Tensor:
    """Return True where a box is in the first step that its mark is in, ``(B, T, K)`` bool."""
    present = extra[REGION_MASK]  # (B, T, K)
    marks = marks_of(extra)
    same = marks.unsqueeze(1) == marks.unsqueeze(2)  # (B, K, K)
    seen = (present.float() @ same.float()) > 0  # (B, T, K): any box of the mark
    before = seen.int().cumsum(1) - seen.int()  # steps with the mark before this one
    return present & (before == 0)
