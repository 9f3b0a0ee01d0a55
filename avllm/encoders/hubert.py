"""Encode sound with HuBERT: wav2vec 2.0's architecture, trained otherwise."""

from __future__ import annotations

from transformers import HubertConfig, HubertModel

from avllm.encoders.wav2vec2 import Wav2Vec2


class HuBERT(Wav2Vec2):
    """HuBERT (Hsu et al. 2021, arXiv:2106.07447).

    Arguments: see :class:`~avllm.encoders.wav2vec2.Wav2Vec2`.
    """

    config_class = HubertConfig
    model_class = HubertModel
    other_keys = (
        r"(lm_head|projector|classifier|final_proj|label_embs_concat)\b",
        r"layer_weights$",
        r"(\w+\.)?masked_spec_embed$",
    )
