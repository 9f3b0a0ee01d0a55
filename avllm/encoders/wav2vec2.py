"""Encode the waveform itself with wav2vec 2.0."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, Wav2Vec2Config, Wav2Vec2Model

from avllm.encoders._audio import WaveformPreprocessor, window_steps
from avllm.encoders._backbone import Backbone


class Wav2Vec2(Backbone):
    """wav2vec 2.0 (Baevski et al. 2020, arXiv:2006.11477): 50 steps a second, one token each.

    A step sees 25 ms and moves by 20 ms, so a window also gets the few samples after its end that
    its last step sees. Windows have one length, so that clips share a batch. A short sound is
    padded with silence; checkpoints that were trained with a mask (``feat_extract_norm="layer"``)
    get one that hides the padding from the attention. SpecAugment is off: it draws from numpy's
    global generator, which no resume restores.

    Args:
        config, layers, preprocessing: see :class:`~avllm.encoders._backbone.Backbone`.
        window: seconds of sound in a window, rounded down to whole steps. Choose a short one for
            short clips: padding costs time.

    Raises:
        ValueError: the config has an adapter after the transformer (``add_adapter``), which changes
            the clock.
    """

    medium = "audio"
    config_class: ClassVar[type[PretrainedConfig]] = Wav2Vec2Config
    model_class: ClassVar[type[PreTrainedModel]] = Wav2Vec2Model
    other_keys: ClassVar[tuple[str, ...]] = (
        r"(wav2vec2\.)?(quantizer|project_q|project_hid)\.",
        r"(lm_head|projector|classifier|feature_extractor_head)\.",
        r"layer_weights$",
        r"(\w+\.)?masked_spec_embed$",  # SpecAugment's filling
    )
    preprocessing_keys = ("sampling_rate", "return_attention_mask", "do_normalize")

    def __init__(
        self,
        config: PretrainedConfig | dict[str, Any],
        *,
        layers: list[int] | None = None,
        window: float = 30.0,
        preprocessing: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(config, layers=layers, preprocessing=preprocessing)
        c = self.backbone_config
        if getattr(c, "add_adapter", False):
            raise ValueError(
                f"{type(self).__name__}: the config has add_adapter=True; "
                "expected False: load the backbone without the adapter"
            )
        self.window = window
        self.rate = int((preprocessing or {}).get("sampling_rate", 16_000))
        self.step_samples = math.prod(c.conv_stride)
        # The backbone takes any length, so the window is the most that it takes.
        most = max(1, int(window * self.rate / self.step_samples + 1e-6))
        name = type(self).__name__
        self.steps = window_steps(window, self.rate, self.step_samples, most, name)

    @classmethod
    def build(cls, config: PretrainedConfig) -> PreTrainedModel:
        """Build the backbone with random weights and without SpecAugment."""
        config.apply_spec_augment = False
        config.mask_time_prob = 0.0
        config.mask_feature_prob = 0.0
        return super().build(config)

    def options(self) -> dict[str, Any]:
        """See :meth:`Backbone.options`."""
        return {**super().options(), "window": self.window}

    def preprocessor(self) -> WaveformPreprocessor:
        """Return the waveform's preprocessing, normalised where the checkpoint asks for it."""
        c = self.backbone_config
        settings = self.preprocessing or {}
        norm = getattr(c, "feat_extract_norm", "layer")  # data2vec has no other
        has_mask = settings.get("return_attention_mask", norm == "layer")
        receptive = 1  # samples that one output of the layers so far sees
        jump = 1  # samples between two outputs of the layers so far
        for kernel, stride in zip(c.conv_kernel, c.conv_stride, strict=True):
            receptive += (kernel - 1) * jump
            jump *= stride
        return WaveformPreprocessor(
            rate=self.rate,
            unit_samples=self.steps * self.step_samples,
            steps=self.steps,
            tokens=1,
            receptive=receptive,
            normalise=bool(settings.get("do_normalize", True)),
            attention_mask=bool(has_mask),
        )

    def arrange(self, x: Tensor, out: Any) -> Tensor:
        """Give each step one token: ``(U, S, D)`` -> ``(U, S, 1, D)``."""
        return x[:, :, None]
