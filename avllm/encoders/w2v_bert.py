"""Encode speech with w2v-BERT 2.0: words, in the most languages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torchaudio
from torch import Tensor
from torch.nn.functional import pad
from transformers import PretrainedConfig, PreTrainedModel, Wav2Vec2BertConfig, Wav2Vec2BertModel

from avllm.encoders._audio import FbankPreprocessor, window_steps
from avllm.encoders._backbone import Backbone

RATE = 16_000
HOP = 160  # samples between two of Kaldi's frames
FRAME = 400  # samples of a frame


@dataclass(frozen=True)
class StackedFbankPreprocessor(FbankPreprocessor):
    """Compute Kaldi's filter banks as ``SeamlessM4TFeatureExtractor`` does, some frames a step.

    Each band has mean 0 and variance 1 over the window's frames.

    Attributes:
        stride: frames of a step.
    """

    stride: int = 2

    def prepare(self, x: Tensor) -> dict[str, Tensor]:
        """Return ``input_features`` (S, stride * mels) and ``attention_mask`` (S,)."""
        shortest = FRAME + (self.stride - 1) * HOP  # one whole step
        x = pad(x, (0, max(0, shortest - x.shape[0]))) * 2**15
        bank = torchaudio.compliance.kaldi.fbank(
            x[None], sample_frequency=self.rate, num_mel_bins=self.mels
        )[: self.frames]  # (frames, mels)
        bank = (bank - bank.mean(0)) / torch.sqrt(bank.var(0) + 1e-7)
        whole_steps = len(bank) // self.stride
        bank = pad(bank, (0, 0, 0, self.frames - len(bank)))
        return {
            "input_features": bank.reshape(self.steps, self.stride * self.mels),
            "attention_mask": (torch.arange(self.steps) < whole_steps).long(),
        }


class W2vBert(Backbone):
    """w2v-BERT 2.0 (Barrault et al. 2023, arXiv:2312.05187): 50 steps a second, one token each.

    It reads two frames of a spectrogram at a time, which is cheaper than wav2vec 2.0's
    convolutions over the waveform. SpecAugment is off.

    Args:
        config, layers, preprocessing: see :class:`~avllm.encoders._backbone.Backbone`.
        window: seconds of sound in a window, rounded down to whole steps. Choose a short one for
            short clips: padding costs time.

    Raises:
        ValueError: the config has an adapter after the transformer (``add_adapter``), which changes
            the clock.
    """

    medium = "audio"
    config_class = Wav2Vec2BertConfig
    model_class = Wav2Vec2BertModel
    other_keys = (
        r"(lm_head|projector|classifier|tdnn|objective)\b",
        r"feature_extractor\.(weight|bias)$",
        r"layer_weights$",
        r"(\w+\.)?masked_spec_embed$",
    )
    preprocessing_keys = ("stride",)

    def __init__(
        self,
        config: PretrainedConfig | dict[str, Any],
        *,
        layers: list[int] | None = None,
        window: float = 30.0,
        preprocessing: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(config, layers=layers, preprocessing=preprocessing)
        if self.backbone_config.add_adapter:
            raise ValueError(
                "W2vBert: the config has add_adapter=True; expected False: load the backbone "
                "without the adapter"
            )
        self.window = window
        self.stride = int((preprocessing or {}).get("stride", 2))
        # The backbone takes any length, so the window is the most that it takes.
        step = self.stride * HOP
        most = max(1, int(window * RATE / step + 1e-6))
        self.steps = window_steps(window, RATE, step, most, "W2vBert")

    @classmethod
    def build(cls, config: PretrainedConfig) -> PreTrainedModel:
        """Build the backbone with random weights and without SpecAugment."""
        config.apply_spec_augment = False
        config.mask_time_prob = 0.0
        config.mask_feature_prob = 0.0
        return super().build(config)

    def options(self) -> dict[str, Any]:
        """See :meth:`Backbone.options`."""
        return super().options() | {"window": self.window}

    def preprocessor(self) -> StackedFbankPreprocessor:
        """Return Kaldi filter banks, by the config and the checkpoint's settings."""
        frames = self.steps * self.stride
        return StackedFbankPreprocessor(
            rate=RATE,
            unit_samples=frames * HOP,
            steps=self.steps,
            tokens=1,
            mels=int(self.backbone_config.feature_projection_input_dim) // self.stride,
            frames=frames,
            used=frames,
            stride=self.stride,
        )

    def arrange(self, x: Tensor, out: Any) -> Tensor:
        """Give each step one token: ``(U, S, D)`` -> ``(U, S, 1, D)``."""
        return x[:, :, None]
