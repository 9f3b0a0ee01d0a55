"""Encode frames with InternViT, out of InternVL."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import InternVLVisionConfig, InternVLVisionModel

from avllm.encoders._visual import BICUBIC, IMAGENET_MEAN, IMAGENET_STD, VisualBackbone


class InternViT(VisualBackbone):
    """InternViT (Chen et al. 2023, arXiv:2312.14238), trained together with an LLM: also texts.

    Loads out of a full InternVL checkpoint (``OpenGVLab/InternVL3-1B-hf``). Arguments: see
    :class:`~avllm.encoders._visual.VisualBackbone`.
    """

    config_class = InternVLVisionConfig
    model_class = InternVLVisionModel
    tower = "vision_config"
    key_mapping: ClassVar[dict[str, str]] = {r"^(model\.)?vision_tower\.": ""}
    other_keys = (r"(model\.)?(multi_modal_projector|language_model)\.", r"lm_head\.")
    features = ("patch", "cls", "all")
    defaults: ClassVar[dict[str, Any]] = {
        "resample": BICUBIC,
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
    }

    def call_options(self) -> dict[str, Any]:
        """Return nothing: the backbone always interpolates."""
        return {}
