"""Encode sound with CLAP's audio tower (HTSAT)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d
from transformers import ClapAudioConfig, ClapAudioModel, PretrainedConfig

from avllm.encoders._audio import ClapPreprocessor
from avllm.encoders._backbone import Backbone


class CLAP(Backbone):
    """LAION's CLAP (Wu et al. 2022, arXiv:2211.06687): a Swin transformer on a spectrogram.

    The spectrogram is folded into a square: several stretches of time lie above each other. The
    last feature map keeps both axes: 32 time steps of 0.3125 s by 2 frequencies for the released
    models, 10 s at 48 kHz a window. The maps of earlier stages are finer and narrower; they are
    averaged onto the grid of the last, so that all layers share one clock (``out_dims`` gives their
    widths). Layers count stages: 0 is the patch embedding.

    Args:
        config, layers, preprocessing: see :class:`~avllm.encoders._backbone.Backbone`.
        window: seconds of sound in a window, rounded down to whole steps; it is then repeated to
            fill up the checkpoint's 10 s, as short sound was in its training. None means all that
            the backbone takes.
        feature: ``patch``, or ``pooled`` (one vector a window, before CLAP's projection; last layer
            only).

    Raises:
        ValueError: an unknown feature, or pooled with inner layers.
    """

    medium = "audio"
    config_class = ClapAudioConfig
    model_class = ClapAudioModel
    tower = "audio_config"
    key_mapping: ClassVar[dict[str, str]] = {r"^audio_model\.audio_encoder\.": "audio_encoder."}
    other_keys = (
        r"text_model\.",
        r"(audio|text)_projection\.",
        r"logit_scale_[at]$",
        r".*relative_position_index$",
    )
    features = ("patch", "pooled")
    preprocessing_keys = (
        "sampling_rate",
        "hop_length",
        "max_length_s",
        "fft_window_size",
        "frequency_min",
        "frequency_max",
        "padding",
    )

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
        settings = preprocessing or {}
        self.rate = int(settings.get("sampling_rate", 48_000))
        self.hop = int(settings.get("hop_length", 480))
        self.samples = self._window_samples(settings)
        self.steps = self._steps()

    @property
    def depth(self) -> int:
        """Number of stages."""
        return len(self.backbone_config.depths)

    @property
    def fold(self) -> int:
        """Number of stretches of time that lie above each other in the square."""
        return int(self.backbone_config.spec_size // self.backbone_config.num_mel_bins)

    @property
    def grid(self) -> tuple[int, int]:
        """(time steps, frequencies) of the last map."""
        c = self.backbone_config
        stride = c.patch_stride if isinstance(c.patch_stride, int) else c.patch_stride[0]
        side = c.spec_size // stride // 2 ** (self.depth - 1)
        return side * self.fold, side // self.fold

    @property
    def out_dims(self) -> dict[str, int]:
        """Width of each layer given out: it doubles at the end of every stage but the last."""
        first_width = int(self.backbone_config.patch_embeds_hidden_size)
        widths = {}
        for name, layer in zip(self.layer_names, self.layers, strict=True):
            doublings = min(self.from_start(layer), self.depth - 1)
            widths[name] = first_width * 2**doublings
        return widths

    def _window_samples(self, settings: dict[str, Any]) -> int:
        """Return the samples that fill the backbone.

        They are the checkpoint's 10 s, or fewer where its spectrogram has no room for them.
        """
        room = (self.backbone_config.spec_size * self.fold - 1) * self.hop
        asked = int(settings.get("max_length_s", 10) * self.rate)
        return min(asked, room)

    def _steps(self) -> int:
        most = self.grid[0]
        if self.window is None:
            return most
        steps = int(self.window * self.rate * most / self.samples + 1e-6)
        if not 1 <= steps <= most:
            step = self.samples / most / self.rate
            raise ValueError(
                f"CLAP: window={self.window} s; expected from {step:g} to {step * most:g} s"
            )
        return steps

    def options(self) -> dict[str, Any]:
        """See :meth:`Backbone.options`."""
        return super().options() | {"window": self.window, "feature": self.feature}

    def preprocessor(self) -> ClapPreprocessor:
        """Return a mel spectrogram in decibels, by the config and the checkpoint's settings."""
        c = self.backbone_config
        settings = self.preprocessing or {}
        return ClapPreprocessor(
            rate=self.rate,
            unit_samples=self.samples * self.steps // self.grid[0],
            steps=self.steps if self.feature == "patch" else 1,
            tokens=self.grid[1] if self.feature == "patch" else 1,
            samples=self.samples,
            mels=c.num_mel_bins,
            hop=self.hop,
            n_fft=int(settings.get("fft_window_size", 1024)),
            low=float(settings.get("frequency_min", 50)),
            high=float(settings.get("frequency_max", 14_000)),
            padding=str(settings.get("padding", "repeatpad")),
            fusion=bool(c.enable_fusion),
        )

    def arrange(self, x: Tensor, out: Any) -> Tensor:
        """Unfold a layer: the last map ``(U, D, P, S)``, or a square ``(U, D, H, W)`` of a stage.

        Returns:
            ``(U, S, P, D)``.
        """
        if self.feature == "pooled":
            return out.pooler_output[:, None, None]  # (U, 1, 1, D)
        if x is not out.last_hidden_state:
            x = (
                x.unflatten(2, (self.fold, -1)).transpose(2, 3).flatten(3)
            )  # (U, D, frequencies, time)
            x = adaptive_avg_pool2d(x, (self.grid[1], self.grid[0]))
        return x.permute(0, 3, 2, 1)[:, : self.steps]  # (U, S, P, D)
