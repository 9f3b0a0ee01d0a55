"""Encode frames with DINOv2, which learned from pictures without text."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import Dinov2Config, Dinov2Model, PretrainedConfig, PreTrainedModel

from avllm.encoders._visual import BICUBIC, IMAGENET_MEAN, IMAGENET_STD, VisualBackbone, pair


class DINOv2(VisualBackbone):
    """DINOv2 ViT (Oquab et al. 2023, arXiv:2304.07193).

    The backbone interpolates its position embedding to any picture, so the size is the crop that
    the checkpoint's preprocessing makes (224), not the 518 of its config; without a checkpoint it
    is the config's. Arguments: see :class:`~avllm.encoders._visual.VisualBackbone`.
    """

    config_class: ClassVar[type[PretrainedConfig]] = Dinov2Config
    model_class: ClassVar[type[PreTrainedModel]] = Dinov2Model
    other_keys = (r"classifier\.",)
    defaults: ClassVar[dict[str, Any]] = {
        "resample": BICUBIC,
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
        "size": {"shortest_edge": 256},
        "crop_size": {"height": 224, "width": 224},
    }

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) that the backbone gets."""
        if self.asked_size is not None:
            return pair(self.asked_size)
        if self.preprocessing and "crop_size" in self.preprocessing:
            return pair(self.preprocessing["crop_size"])
        return pair(self.backbone_config.image_size)

    def call_options(self) -> dict[str, Any]:
        """Return nothing: the backbone always interpolates."""
        return {}
