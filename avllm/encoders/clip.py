"""Encode frames with CLIP's vision tower."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import CLIPVisionConfig, CLIPVisionModel, PretrainedConfig, PreTrainedModel

from avllm.encoders._visual import BICUBIC, CLIP_MEAN, CLIP_STD, VisualBackbone


class CLIP(VisualBackbone):
    """CLIP ViT (Radford et al. 2021, arXiv:2103.00020).

    Patch tokens are the blocks' raw output (CLIP applies its final norm to the class token only);
    LLaVA takes ``layers=[-2]``.
    Arguments: see :class:`~avllm.encoders._visual.VisualBackbone`.
    """

    config_class: ClassVar[type[PretrainedConfig]] = CLIPVisionConfig
    model_class: ClassVar[type[PreTrainedModel]] = CLIPVisionModel
    tower = "vision_config"
    other_keys = (
        r"text_model\.",
        r"logit_scale$",
        r"(visual|text)_projection\.",
        r".*position_ids$",
    )
    defaults: ClassVar[dict[str, Any]] = {
        "resample": BICUBIC,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "size": {"shortest_edge": 224},
        "crop_size": {"height": 224, "width": 224},
    }
