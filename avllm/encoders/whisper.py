"""Encode sound with Whisper's encoder."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from avllm.encoders._audio import MelPreprocessor, window_steps
from avllm.encoders._backbone import Backbone


class Whisper(Backbone):
    """The encoder of Whisper (Radford et al. 2022, arXiv:2212.04356): 50 tokens a second.

    Sound is cut into windows, and each is padded with silence to the length of the position
    embedding: 3,000 mel frames (30 s) in every released model, ``2 * max_source_positions`` in
    general. A shorter ``window`` costs as much time a window, and lets attention see less at once.

    Args:
        config, layers, preprocessing: see :class:`~avllm.encoders._backbone.Backbone`.
        window: seconds of sound in a window; None means all that the backbone takes.
    """

    medium = "audio"
    config_class: ClassVar[type[PretrainedConfig]] = WhisperConfig
    model_class: ClassVar[type[PreTrainedModel]] = WhisperEncoder
    key_mapping: ClassVar[dict[str, str]] = {r"^(model\.)?encoder\.": ""}
    other_keys: ClassVar[tuple[str, ...]] = (
        r"(model\.)?decoder\.",
        r"proj_out\.",
        r"projector\.",
        r"classifier\.",
        r"layer_weights$",
    )
    stride = 2  # mel frames of a step
    preprocessing_keys = ("sampling_rate", "hop_length", "n_fft")

    def __init__(
        self,
        config: PretrainedConfig | dict[str, Any],
        *,
        layers: list[int] | None = None,
        window: float | None = None,
        preprocessing: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(config, layers=layers, preprocessing=preprocessing)
        self.window = window
        settings = preprocessing or {}
        self.rate = int(settings.get("sampling_rate", 16_000))
        self.hop = int(settings.get("hop_length", 160))
        # The second convolution of the stem has stride 2.
        self.frames = 2 * int(self.backbone_config.max_source_positions)
        step = self.stride * self.hop
        name = type(self).__name__
        self.steps = window_steps(window, self.rate, step, self.frames // self.stride, name)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return int(self.backbone_config.encoder_layers)

    def options(self) -> dict[str, Any]:
        """See :meth:`Backbone.options`."""
        return {**super().options(), "window": self.window}

    def preprocessor(self) -> MelPreprocessor:
        """Return the log-mel spectrogram, by the config and the checkpoint's settings."""
        return MelPreprocessor(
            rate=self.rate,
            unit_samples=self.steps * self.stride * self.hop,
            steps=self.steps,
            tokens=1,
            mels=int(self.backbone_config.num_mel_bins),
            frames=self.frames,
            hop=self.hop,
            n_fft=int((self.preprocessing or {}).get("n_fft", 400)),
        )

    def arrange(self, x: Tensor, out: Any) -> Tensor:
        """Drop the steps of a window's padding: ``(U, positions, D)`` -> ``(U, S, 1, D)``."""
        return x[:, : self.steps, None]
