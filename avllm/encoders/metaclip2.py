"""Encode frames with MetaCLIP 2: CLIP, trained on captions of the whole world."""

from __future__ import annotations

from transformers import MetaClip2VisionConfig, MetaClip2VisionModel

from avllm.encoders.clip import CLIP


class MetaCLIP2(CLIP):
    """MetaCLIP 2 (Chuang et al. 2025, arXiv:2507.22062): CLIP's form, captions of 300 languages.

    Arguments: see :class:`~avllm.encoders._visual.VisualBackbone`.
    """

    config_class = MetaClip2VisionConfig
    model_class = MetaClip2VisionModel
