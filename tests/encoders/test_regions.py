"""Boxes of regions against the pixels of a coloured rectangle, after each preprocessing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from encoders.encoder_families import CONFIGS, Frames, build
from torch import Tensor

from avllm.data.media.load import RegionBox
from avllm.encoders._clip import ClipPreprocessor
from avllm.encoders._visual import VisualPreprocessor, normalise
from avllm.encoders.base import Preprocessor
from avllm.encoders.siglip2 import NaFlexPreprocessor
from avllm.registry import choices

SHAPES = [(120, 200), (200, 120), (90, 90), (77, 133)]
BOX = (0.30, 0.25, 0.62, 0.70)
VISUAL = [name for name in choices("encoders") if name in CONFIGS and build(name).medium == "video"]
PREPROCESSORS: dict[str, Preprocessor] = {
    **{name: build(name).preprocessor() for name in VISUAL},
    "crop": VisualPreprocessor((64, 64), 1, shortest=64),
    "crop of a larger picture": VisualPreprocessor((64, 64), 1, shortest=80),
    "wide": VisualPreprocessor((48, 96), 1),
    "native": NaFlexPreprocessor(8, 100),
}


def painted(height: int, width: int, box: tuple[float, ...] = BOX) -> Frames:
    """A black picture with a white rectangle that fills the box."""
    x = torch.zeros(2, height, width, 3, dtype=torch.uint8)
    x0, y0, x1, y1 = (
        round(share * side) for share, side in zip(box, [width, height] * 2, strict=True)
    )
    x[:, y0:y1, x0:x1] = 255
    exact = (x0 / width, y0 / height, x1 / width, y1 / height)
    return Frames(x, torch.tensor([[0.0, 1.0], [1.0, 2.0]]), (RegionBox("r", exact),))


def pixels(preprocessor: Preprocessor, inputs: dict[str, Tensor]) -> Tensor:
    """Brightness of the first picture as the encoder gets it, ``(h, w)``, 0 to 1."""
    x = inputs["pixel_values"][0]
    if isinstance(preprocessor, ClipPreprocessor):
        x = x[0]  # the first frame of a unit
    if isinstance(preprocessor, NaFlexPreprocessor):
        (rows, columns), side = inputs["spatial_shapes"][0].tolist(), preprocessor.patch
        grid = x[: rows * columns].view(rows, columns, side, side, 3)
        x = grid.permute(4, 0, 2, 1, 3).reshape(3, rows * side, columns * side)
    ends = torch.tensor([[[[0]]], [[[255]]]], dtype=torch.uint8).expand(2, 3, 1, 1)
    black, white = normalise(ends, preprocessor.scale, preprocessor.mean, preprocessor.std)
    return ((x - black) / (white - black)).mean(0)


@pytest.mark.parametrize("name", PREPROCESSORS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_box_is_where_the_rectangle_is(name: str, shape: tuple[int, int]) -> None:
    preprocessor = PREPROCESSORS[name]
    item = preprocessor(painted(*shape), 2.0)
    seen = pixels(preprocessor, item.inputs)
    assert item.extra["picture_size"].tolist() == [list(seen.shape)]
    assert item.extra["region_boxes"].shape == (len(item.span), 1, 4)
    assert bool(item.extra["region_mask"].all())
    x0, y0, x1, y1 = item.extra["region_boxes"][0, 0].tolist()
    # sums over rows and columns are the rectangle's sides, whatever resampling does at its edges
    bright = seen > 0.5
    columns, rows = bright.any(0).nonzero().flatten(), bright.any(1).nonzero().flatten()
    assert int(columns[0]) == pytest.approx(x0, abs=0.75)
    assert int(columns[-1]) + 1 == pytest.approx(x1, abs=0.75)
    assert int(rows[0]) == pytest.approx(y0, abs=0.75)
    assert int(rows[-1]) + 1 == pytest.approx(y1, abs=0.75)
    assert float(seen.clamp(0, 1).sum()) == pytest.approx((x1 - x0) * (y1 - y0), rel=0.06)


def test_by_hand() -> None:
    crop = VisualPreprocessor((64, 64), 1, shortest=64)
    given = replace(
        painted(100, 200),
        regions=(RegionBox("a", (0.0, 0.0, 0.5, 1.0)), RegionBox("b", (0.8, 0, 0.9, 1))),
    )
    item = crop(given, 2.0)  # resized to 64 x 128, 32 pixels cut off at the left
    assert item.extra["region_boxes"][0].tolist() == [[0, 0, 32, 64], [64, 0, 64, 64]]
    assert item.extra["region_mask"].tolist() == [[True, False], [True, False]]


def test_a_region_of_a_moment_is_in_the_nearest_frame() -> None:
    given = replace(
        painted(64, 64),
        regions=(RegionBox("a", BOX, 1.7), RegionBox("b", BOX), RegionBox("c", BOX, 9.0)),
    )
    item = VisualPreprocessor((64, 64), 1)(given, 2.0)
    assert item.extra["region_mask"].tolist() == [[False, True, False], [True, True, True]]


def test_no_regions_no_side_information() -> None:
    assert VisualPreprocessor((64, 64), 1)(replace(painted(64, 64), regions=()), 2.0).extra == {}
