"""Encode sound with PE-AV: sounds in the space of the video that they belong to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import PeAudioEncoder, PeAudioEncoderConfig, PretrainedConfig

from avllm.encoders._audio import SoundPreprocessor, window_steps
from avllm.encoders._backbone import Backbone


@dataclass(frozen=True)
class HopPreprocessor(SoundPreprocessor):
    """Pass on the waveform as ``PeAudioFeatureExtractor`` does.

    Attributes:
        hop: samples of a frame, up to whose multiple the sound is mirrored at its end.
    """

    hop: int = 1920

    def prepare(self, x: Tensor) -> dict[str, Tensor]:
        """Return ``input_values`` (1, unit_samples) and ``padding_mask`` (unit_samples,)."""
        mirrored = np.pad(x.numpy(), (0, -len(x) % self.hop), "reflect")
        silence = self.unit_samples - len(mirrored)
        return {
            "input_values": torch.from_numpy(np.pad(mirrored, (0, silence)))[None],
            "padding_mask": (torch.arange(self.unit_samples) < len(mirrored)).long(),
        }


class PEAVAudio(Backbone):
    """The audio tower of PE-AV (Vyas et al. 2025, arXiv:2512.19687): 25 steps a second, one token.

    Loads out of a full PE-AV checkpoint as well. The joint audio-video tower is left out: an
    encoder here has one medium, and the connector joins them.

    Args:
        config, layers, preprocessing: see :class:`~avllm.encoders._backbone.Backbone`.
        window: seconds of sound in a window, rounded down to whole steps. Choose a short one for
            short clips: padding costs time.
        feature: ``patch``, or ``pooled`` (one vector a window, before the projection into the
            space of texts; last layer only).

    Raises:
        ValueError: an unknown feature, or pooled with inner layers.
    """

    medium = "audio"
    config_class = PeAudioEncoderConfig
    model_class = PeAudioEncoder
    tower = "audio_config"
    key_mapping: ClassVar[dict[str, str]] = {r"^(audio_model\.)?audio_encoder\.": ""}
    other_keys = (
        r"(text_model|video_model|audio_video_encoder)\.",
        r"(audio_model\.)?(text_\w+|audio_\w*head)\b",
        r"\w+_(head|logit_scale|logit_bias)\b",
    )
    features = ("patch", "pooled")
    preprocessing_keys = ("sampling_rate",)

    def __init__(
        self,
        config: PretrainedConfig | dict[str, Any],
        *,
        layers: list[int] | None = None,
        window: float = 30.0,
        feature: str = "patch",
        preprocessing: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(config, layers=layers, preprocessing=preprocessing)
        self.window = window
        self.feature = feature
        self.check_feature()
        self.rate = int((preprocessing or {}).get("sampling_rate", 48_000))
        self.hop = int(self.backbone_config.dac_config.hop_length)
        most = int(self.backbone_config.max_position_embeddings) - 1  # less the class token
        self.steps = window_steps(window, self.rate, self.hop, most, "PEAVAudio")

    @classmethod
    def read_config(cls, config: PretrainedConfig | dict[str, Any]) -> PretrainedConfig:
        """See :meth:`Backbone.read_config`; in a full model the tower is one level deeper."""
        if isinstance(config, PretrainedConfig):
            config = config.to_dict()
        return super().read_config(config.get("audio_video_config", config))

    def options(self) -> dict[str, Any]:
        """See :meth:`Backbone.options`."""
        return super().options() | {"window": self.window, "feature": self.feature}

    def preprocessor(self) -> HopPreprocessor:
        """Return the waveform's preprocessing."""
        return HopPreprocessor(
            rate=self.rate,
            unit_samples=self.steps * self.hop,
            steps=1 if self.feature == "pooled" else self.steps,
            tokens=1,
            hop=self.hop,
        )

    def arrange(self, x: Tensor, out: Any) -> Tensor:
        """Leave out the class token of inner layers: ``(U, [1 +] S, D)`` -> ``(U, S, 1, D)``."""
        if self.feature == "pooled":
            return out.pooler_output[:, None, None]
        return x[:, -self.steps :, None]
