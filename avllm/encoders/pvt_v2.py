"""Encode frames with the Pyramid Vision Transformer v2: attention over overlapping patches."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from transformers import PretrainedConfig, PvtV2Config, PvtV2Model

from avllm.encoders._visual import (
    BICUBIC,
    IMAGENET_MEAN,
    IMAGENET_STD,
    VisualBackbone,
    average_onto,
)


class PVTv2(VisualBackbone):
    """PVT v2 (Wang et al. 2021, arXiv:2106.13797).

    Its patches overlap, so it learns shapes from few pictures. Layer i is the map after stage i + 1
    (there is no embedding before the first); earlier, finer maps are averaged onto the grid of the
    last.

    Args:
        config, options: see :class:`~avllm.encoders._visual.VisualBackbone`.
    """

    config_class = PvtV2Config
    model_class = PvtV2Model
    other_keys = (r"classifier\.",)
    prefix = 0
    features = ("patch",)
    defaults: ClassVar[dict[str, Any]] = {
        "resample": BICUBIC,
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
    }

    def __init__(self, config: PretrainedConfig | dict[str, Any], **options: Any) -> None:
        super().__init__(config, **options)
        # In this order of memory its convolutions are several times faster on CPUs, and the same.
        self.backbone.to(memory_format=torch.channels_last)  # type: ignore[call-arg]

    @classmethod
    def from_pretrained(cls, name_or_path: str, **options: Any) -> Self:
        """See :meth:`Backbone.from_pretrained`."""
        encoder = super().from_pretrained(name_or_path, **options)
        # The loaded backbone replaced the one that was built.
        encoder.backbone.to(memory_format=torch.channels_last)  # type: ignore[call-arg]
        return encoder

    @property
    def depth(self) -> int:
        """Number of stages after the first."""
        return int(self.backbone_config.num_encoder_blocks) - 1

    @property
    def out_dims(self) -> dict[str, int]:
        """Width of each layer given out: every stage has its own."""
        sizes = self.backbone_config.hidden_sizes
        widths = [int(sizes[self.from_start(layer)]) for layer in self.layers]
        return dict(zip(self.layer_names, widths, strict=True))

    @property
    def own_grid(self) -> tuple[int, int]:
        """(rows, columns) of the last map: each stage divides by its stride, rounding up."""
        height, width = self.image_size
        for stride in self.backbone_config.strides[: self.depth + 1]:
            height = -(-height // stride)
            width = -(-width // stride)
        return height, width

    def call_options(self) -> dict[str, Any]:
        """Return nothing: there is no position embedding to interpolate, and any size works."""
        return {}

    def arrange(self, x: Tensor, out: Any) -> Tensor:
        """Average a stage's map ``(U, D, H, W)`` onto the grid: ``(U, 1, P, D)``."""
        return average_onto(x, self.grid)[:, None]  # (U, 1, P, D)
