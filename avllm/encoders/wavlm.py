"""Encode speech with WavLM: who speaks, and how, beside the words."""

from __future__ import annotations

from transformers import WavLMConfig, WavLMModel

from avllm.encoders.wav2vec2 import Wav2Vec2


class WavLM(Wav2Vec2):
    """WavLM (Chen et al. 2021, arXiv:2110.13900): HuBERT on mixed and noisy speech.

    Its relative positions are gated by what is heard. Arguments: see
    :class:`~avllm.encoders.wav2vec2.Wav2Vec2`.
    """

    config_class = WavLMConfig
    model_class = WavLMModel
    other_keys = (
        r"(lm_head|projector|classifier|tdnn|objective)\b",
        r"feature_extractor\.(weight|bias)$",  # of WavLMForXVector's head
        r"layer_weights$",
        r"(\w+\.)?masked_spec_embed$",
    )
