"""Encode speech with data2vec: wav2vec 2.0's form, trained to predict its own features."""

from __future__ import annotations

from transformers import Data2VecAudioConfig, Data2VecAudioModel

from avllm.encoders.wav2vec2 import Wav2Vec2


class Data2VecAudio(Wav2Vec2):
    """data2vec's audio model (Baevski et al. 2022, arXiv:2202.03555).

    Arguments: see :class:`~avllm.encoders.wav2vec2.Wav2Vec2`.
    """

    config_class = Data2VecAudioConfig
    model_class = Data2VecAudioModel
    other_keys = (
        r"(lm_head|projector|classifier|tdnn|objective)\b",
        r"feature_extractor\.(weight|bias)$",  # of the XVector model's head
        r"layer_weights$",
        r"(\w+\.)?masked_spec_embed$",
    )
