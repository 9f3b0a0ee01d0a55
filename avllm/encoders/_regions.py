"""Carry regions of a picture through resizing and cropping, into the encoder's pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from avllm.tokens import PICTURE_SIZE, REGION_BOXES, REGION_MASK


@dataclass(frozen=True)
class Placement:
    """Place of a picture in an encoder's input: it is resized, then cut out.

    Attributes:
        resized: (height, width) in pixels after resizing.
        top, left: what the crop takes away above and at the left.
        size: (height, width) of the encoder's input.
    """

    resized: tuple[int, int]
    top: int
    left: int
    size: tuple[int, int]

    def boxes(self, shares: Tensor) -> Tensor:
        """Map boxes ``(..., 4)`` (x0, y0, x1, y1) from shares of the picture to encoder pixels.

        What lies outside of the crop is cut off; a box wholly outside keeps no area.
        """
        height, width = self.resized
        most_y, most_x = self.size
        scale = torch.tensor([width, height, width, height])
        shift = torch.tensor([self.left, self.top, self.left, self.top])
        most = torch.tensor([most_x, most_y, most_x, most_y])
        return (shares * scale - shift).clamp(min=0).minimum(most)


def region_extra(regions: Sequence[Any], span: Tensor, placement: Placement) -> dict[str, Tensor]:
    """Return the side information of K regions of T frames; nothing where there are none.

    Args:
        regions: each with ``box`` (shares of the picture) and ``time`` (seconds of the clip;
            None: in every frame).
        span: ``(T, 2)`` of the frames. placement: of every frame.

    Returns:
        ``region_boxes (T, K, 4)`` float32, pixels of the encoder's input; ``region_mask (T, K)``
        bool, True where the region is in the frame; ``picture_size (1, 2)`` long, height and width
        of the encoder's input.
    """
    if not regions:
        return {}
    steps = len(span)
    shares = torch.tensor([region.box for region in regions], dtype=torch.float64)
    boxes = placement.boxes(shares).float()  # (K, 4)
    has_area = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])  # (K,)
    in_frame = torch.ones(steps, len(regions), dtype=torch.bool)
    for number, region in enumerate(regions):
        if region.time is not None:  # few frames are looked at: take the one nearest to it
            nearest = int((span.mean(-1) - region.time).abs().argmin())
            in_frame[:, number] = torch.arange(steps) == nearest
    return {
        REGION_BOXES: boxes.expand(steps, -1, -1).clone(),
        REGION_MASK: in_frame & has_area,
        PICTURE_SIZE: torch.tensor([placement.size]),
    }
