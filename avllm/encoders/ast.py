"""Encode sound with the Audio Spectrogram Transformer."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import ASTConfig, ASTModel, PretrainedConfig

from avllm.encoders._audio import FbankPreprocessor, window_steps
from avllm.encoders._backbone import Backbone

FRAME_RATE = 100  # Kaldi frames a second


class AST(Backbone):
    """AST (Gong et al. 2021, arXiv:2104.01778): time patches x frequency patches.

    A step is one time stride (0.1 s in the released models), a token one frequency patch. The
    patches of a window end a little before its 1,024 frames do, so windows follow each other after
    ``steps * time_stride`` frames (10.1 s), and both hear the frames that overlap: no sound falls
    between two windows.

    Args:
        config, layers, preprocessing: see :class:`~avllm.encoders._backbone.Backbone`.
        window: seconds of sound in a window, rounded down to whole steps; None means all that the
            backbone takes.
        feature: ``patch``; ``cls`` (one step a window: the class and the distillation token,
            P = 2); ``pooled`` (one step a window: their mean, P = 1; last layer only).

    Raises:
        ValueError: an unknown feature, or pooled with inner layers.
    """

    medium = "audio"
    config_class = ASTConfig
    model_class = ASTModel
    other_keys = (r"classifier\.",)
    features = ("patch", "cls", "pooled")
    preprocessing_keys = ("sampling_rate", "mean", "std", "do_normalize")

    def __init__(
        self,
        config: PretrainedConfig | dict[str, Any],
        *,
        layers: list[int] | None = None,
        window: float | None = None,
        feature: str = "patch",
        preprocessing: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(config, layers=layers, preprocessing=preprocessing)
        self.window = window
        self.feature = feature
        self.check_feature()
        c = self.backbone_config
        self.rate = int((preprocessing or {}).get("sampling_rate", 16_000))
        self.grid = (
            (c.max_length - c.patch_size) // c.time_stride + 1,
            (c.num_mel_bins - c.patch_size) // c.frequency_stride + 1,
        )
        self.step_samples = c.time_stride * self.rate // FRAME_RATE
        self.steps = window_steps(window, self.rate, self.step_samples, self.grid[0], "AST")

    def options(self) -> dict[str, Any]:
        """See :meth:`Backbone.options`."""
        return super().options() | {"window": self.window, "feature": self.feature}

    def preprocessor(self) -> FbankPreprocessor:
        """Return Kaldi filter banks, by the config and the checkpoint's settings."""
        c = self.backbone_config
        settings = self.preprocessing or {}
        used = c.max_length
        if self.steps < self.grid[0]:
            used = (self.steps - 1) * c.time_stride + c.patch_size
        return FbankPreprocessor(
            rate=self.rate,
            unit_samples=self.steps * self.step_samples,
            steps=self.steps if self.feature == "patch" else 1,
            tokens={"patch": self.grid[1], "cls": 2, "pooled": 1}[self.feature],
            mels=c.num_mel_bins,
            frames=c.max_length,
            used=used,
            mean=float(settings.get("mean", FbankPreprocessor.mean)),
            std=float(settings.get("std", FbankPreprocessor.std)),
            normalise=bool(settings.get("do_normalize", True)),
        )

    def arrange(self, x: Tensor, out: Any) -> Tensor:
        """Order a layer's tokens by time: ``(U, 2 + frequency * time, D)`` -> ``(U, S, P, D)``."""
        if self.feature == "pooled":
            return out.pooler_output[:, None, None]  # (U, 1, 1, D)
        if self.feature == "cls":
            return x[:, None, :2]  # (U, 1, 2, D)
        time, frequency = self.grid
        by_time = (
            x[:, 2:].unflatten(1, (frequency, time)).transpose(1, 2)
        )  # (U, time, frequency, D)
        return by_time[:, : self.steps]
