"""Side information by name: checked against the grid, moved, padded, selected."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from avllm.data.collate import gather_stream
from avllm.encoders.base import lay_out
from avllm.tokens import EncoderInput, StreamBatch, Tokens


def tokens(**extra: torch.Tensor) -> Tokens:
    return Tokens(
        torch.rand(2, 3, 4, 5), torch.ones(2, 3, 4, dtype=torch.bool), torch.zeros(2, 3, 2), extra
    )


@pytest.mark.parametrize("shape", [(2,), (1, 3), (2, 2), (2, 4, 3)])
def test_side_information_of_another_grid_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="extra\\['boxes'\\]"):
        tokens(boxes=torch.zeros(shape))


def test_it_goes_where_the_features_go() -> None:
    given = tokens(boxes=torch.rand(2, 3, 7, 4), of_clip=torch.rand(2, 1))
    assert given.with_x(given.x[..., :2]).extra is given.extra
    assert given.to("meta").extra["boxes"].device.type == "meta"
    chosen = given.select(torch.tensor([1, 1, 0]))
    assert torch.equal(chosen.extra["boxes"], given.extra["boxes"][[1, 1, 0]])
    assert torch.equal(chosen.x, given.x[[1, 1, 0]])


def clip(steps: int, **extra: torch.Tensor) -> EncoderInput:
    mask = torch.ones(steps, 1, dtype=torch.bool)
    return EncoderInput({"x": torch.rand(steps, 2)}, torch.zeros(steps, 2), mask, extra=extra)


def test_clips_are_padded_with_zeros_and_reach_the_tokens() -> None:
    boxes, real, whole = torch.rand(2, 3, 4), torch.ones(2, 3, dtype=torch.bool), torch.rand(1, 6)
    batch = gather_stream("video", [clip(2, boxes=boxes, real=real), None, clip(4, whole=whole)])
    assert batch.extra["boxes"].shape == (3, 4, 3, 4)
    assert batch.extra["boxes"].sum() == boxes.sum()
    assert torch.equal(batch.extra["boxes"][0, :2], boxes)
    assert batch.extra["real"].dtype == torch.bool
    assert batch.extra["real"].sum() == 6
    assert torch.equal(batch.extra["whole"], torch.cat([torch.zeros(2, 1, 6), whole[None]]))
    assert lay_out(torch.rand(6, 1, 1, 2), batch).extra is batch.extra
    assert batch.to("meta").extra["boxes"].device.type == "meta"


def test_one_name_has_one_kind() -> None:
    with pytest.raises(ValueError, match="extra 'a'"):
        gather_stream("video", [clip(2, a=torch.zeros(2, 3)), clip(2, a=torch.zeros(2))])


def test_every_field_of_a_stream_is_moved() -> None:
    batch = gather_stream("video", [clip(2, a=torch.zeros(2, 3))])
    batch = replace(batch, features={"": torch.zeros(1, 2, 1, 3)})
    moved = batch.to("meta")
    assert isinstance(moved, StreamBatch)
    for values in (moved.inputs, moved.features, moved.extra):
        assert values
        assert all(value.device.type == "meta" for value in values.values())
    assert {moved.units.device.type, moved.span.device.type, moved.mask.device.type} == {"meta"}
