"""Encode frames with DINOv3: fine, clean features of places, learned without text."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import DINOv3ViTConfig, DINOv3ViTModel

from avllm.encoders._visual import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    VisualBackbone,
    checkpoint_size,
    pair,
)


class DINOv3(VisualBackbone):
    """DINOv3 ViT (Simeoni et al. 2025, arXiv:2508.10104).

    Its positions are rotary and relative to the picture's sides, so ``image_size`` may be any
    multiple of the patch (16), also a rectangle such as [224, 384]. Register tokens are part of
    ``feature="all"`` alone. Arguments: see :class:`~avllm.encoders._visual.VisualBackbone`.
    """

    config_class = DINOv3ViTConfig
    model_class = DINOv3ViTModel
    other_keys = (r"classifier\.",)
    defaults: ClassVar[dict[str, Any]] = {
        "resample": 2,
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
    }

    @property
    def prefix_tokens(self) -> int:
        """Class token and registers."""
        return 1 + int(self.backbone_config.num_register_tokens)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) that the backbone gets."""
        if self.asked_size is not None:
            return pair(self.asked_size)
        return checkpoint_size(self.preprocessing) or pair(self.backbone_config.image_size)

    def call_options(self) -> dict[str, Any]:
        """Return nothing: the backbone takes any size."""
        return {}
