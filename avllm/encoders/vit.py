"""Encode frames with a plain ViT, as classifiers of pictures are."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import ViTConfig, ViTModel

from avllm.encoders._visual import HALF, VisualBackbone


class ViT(VisualBackbone):
    """ViT (Dosovitskiy et al. 2020, arXiv:2010.11929), trained to name what is in a picture.

    Arguments: see :class:`~avllm.encoders._visual.VisualBackbone`.
    """

    config_class = ViTConfig
    model_class = ViTModel
    build_options: ClassVar[dict[str, Any]] = {"add_pooling_layer": False}  # most have none
    other_keys = (r"(vit\.)?pooler\.", r"(classifier|decoder)\.", r"(\w+\.)*mask_token$")
    features = ("patch", "cls", "all")
    defaults: ClassVar[dict[str, Any]] = {"resample": 2, "image_mean": HALF, "image_std": HALF}
