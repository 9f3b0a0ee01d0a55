"""Encode frames with EVA-ViT-g in the layout of BLIP-2."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import Blip2VisionConfig, Blip2VisionModel

from avllm.encoders._visual import BICUBIC, CLIP_MEAN, CLIP_STD, VisualBackbone


class EvaConfig(Blip2VisionConfig):
    """BLIP-2's vision config, in which the norm after the last block may have another epsilon.

    Args:
        post_norm_eps: of that norm; None for ``layer_norm_eps``, which transformers' BLIP-2 takes.
            The original adds 1e-5 there, and 1e-6 in the blocks.
        kwargs: fields of transformers' config.
    """

    def __init__(self, post_norm_eps: float | None = None, **kwargs: Any) -> None:
        self.post_norm_eps = post_norm_eps
        super().__init__(**kwargs)


class EvaModel(Blip2VisionModel):
    """BLIP-2's vision tower with the epsilon of :class:`EvaConfig`."""

    config_class = EvaConfig

    def __init__(self, config: EvaConfig) -> None:
        super().__init__(config)
        if config.post_norm_eps is not None:
            self.post_layernorm.eps = config.post_norm_eps


class EVA(VisualBackbone):
    """EVA-CLIP ViT-g/14 (Fang et al. 2022, arXiv:2211.07636) in BLIP-2's layout (arXiv:2301.12597).

    Loads out of a full BLIP-2 checkpoint as well. By default all tokens are given out, the class
    token first: BLIP-2's Q-Former was trained on them. Arguments: see
    :class:`~avllm.encoders._visual.VisualBackbone`.
    """

    config_class = EvaConfig
    model_class = EvaModel
    tower = "vision_config"
    key_mapping: ClassVar[dict[str, str]] = {r"^vision_model\.": ""}
    other_keys = (
        r"(qformer|language_model|language_projection|embeddings\.word_embeddings)\.",
        r"query_tokens$",
        r"(vision|text)_projection\.",
        r"itm_head\.",
        r"embeddings\.(word|position)_embeddings\.",
    )
    default_feature = "all"
    defaults: ClassVar[dict[str, Any]] = {
        "resample": BICUBIC,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    }
