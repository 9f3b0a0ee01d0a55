"""Encode sound with strided convolutions over its mel spectrogram, learned from few recordings."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from avllm.encoders._audio import MelPreprocessor, window_steps
from avllm.encoders._backbone import Backbone


class MelConvConfig(PretrainedConfig):
    """Shape of a :class:`MelConvModel`.

    Args:
        num_mel_bins: mel bands.
        hidden_size: channels of every layer.
        kernel_sizes, strides: of each layer, in steps of the one before; kernels are odd.
        max_frames: mel frames of a window.
        dropout: of the last layer's output.
        masks: bands, and stretches of time, hidden from each window in training (SpecAugment).
        mask_bands, mask_frames: the widest of them.
    """

    model_type = "mel_conv"

    def __init__(
        self,
        num_mel_bins: int = 64,
        hidden_size: int = 96,
        kernel_sizes: tuple[int, ...] | list[int] = (3, 3, 5, 5),
        strides: tuple[int, ...] | list[int] = (1, 2, 2, 2),
        max_frames: int = 256,
        dropout: float = 0.0,
        masks: int = 0,
        mask_bands: int = 8,
        mask_frames: int = 32,
        **kwargs: Any,
    ) -> None:
        if len(kernel_sizes) != len(strides) or any(k % 2 == 0 for k in kernel_sizes):
            raise ValueError(
                f"mel_conv has kernel_sizes {list(kernel_sizes)} and strides {list(strides)}; "
                "expected lists of equal length and odd kernels"
            )
        self.num_mel_bins = num_mel_bins
        self.hidden_size = hidden_size
        self.kernel_sizes = list(kernel_sizes)
        self.strides = list(strides)
        self.max_frames = max_frames
        self.dropout = dropout
        self.masks = masks
        self.mask_bands = mask_bands
        self.mask_frames = mask_frames
        super().__init__(**kwargs)


class ConvLayer(nn.Module):
    """Compute ``gelu(norm(conv(x)))``; the norm is over the channels and steps of a window."""

    def __init__(self, inside: int, outside: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inside, outside, kernel, stride=stride, padding=kernel // 2)
        self.norm = nn.GroupNorm(1, outside)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``(U, C, T)`` -> ``(U, D, ceil(T / stride))``."""
        return F.gelu(self.norm(self.conv(x)))


class MelConvModel(PreTrainedModel):
    """Whisper's convolutional stem (arXiv:2212.04356) with more layers, and norms; no attention.

    The spectrogram is normalised over the window first, so that loudness makes no difference.
    """

    config_class = MelConvConfig
    base_model_prefix = "mel_conv"
    main_input_name = "input_features"

    def __init__(self, config: MelConvConfig) -> None:
        super().__init__(config)
        self.norm = nn.GroupNorm(1, config.num_mel_bins)
        widths = [config.num_mel_bins, *[config.hidden_size] * len(config.strides)]
        shapes = zip(widths[:-1], widths[1:], config.kernel_sizes, config.strides, strict=True)
        self.layers = nn.ModuleList(ConvLayer(*shape) for shape in shapes)
        self.dropout = nn.Dropout(config.dropout)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Keep torch's initialisation: after every convolution there is a norm."""

    def forward(
        self, input_features: Tensor, output_hidden_states: bool = False
    ) -> BaseModelOutput:
        """Encode ``(U, mels, frames)``.

        Returns:
            ``last_hidden_state`` and, if asked for, ``hidden_states``, each ``(U, T, D)`` with the
            T of its layer.
        """
        x = self.norm(input_features)
        if self.training and self.config.masks:
            x = x.masked_fill(self.draw_masks(x), 0.0)  # 0 is the mean, so the mean does not change
        states = []
        for layer in self.layers:
            x = layer(x)  # (U, D, T)
            states.append(x.transpose(1, 2))
        hidden_states = tuple(states) if output_hidden_states else None
        last = self.dropout(states[-1])
        return BaseModelOutput(last_hidden_state=last, hidden_states=hidden_states)

    def draw_masks(self, x: Tensor) -> Tensor:
        """Draw the bool mask of SpecAugment (arXiv 1904.08779) for ``x (U, mels, frames)``."""
        hidden = torch.zeros_like(x, dtype=torch.bool)
        for dim, widest in ((1, self.config.mask_bands), (2, self.config.mask_frames)):
            size = x.shape[dim]
            place = torch.arange(size, device=x.device)
            for _ in range(self.config.masks):
                width, start = torch.rand(2, len(x), 1, device=x.device)  # (U, 1) each
                width = width * min(widest, size)
                start = start * (size - width)
                stretch = (place >= start) & (place < start + width)  # (U, size)
                hidden |= stretch.unsqueeze(3 - dim)
        return hidden


AutoConfig.register(MelConvConfig.model_type, MelConvConfig, exist_ok=True)


class MelConv(Backbone):
    """Convolve Whisper's log-mel spectrogram: one token a step.

    A step has as many mel frames as the product of the strides. Earlier, finer layers are averaged
    onto the steps of the last. There are no released weights; it is for training from scratch (see
    ``train/presets/esc10``).

    Args:
        config, layers, preprocessing: see :class:`~avllm.encoders._backbone.Backbone`.
        window: seconds of sound in a window; None means ``max_frames``.
    """

    medium = "audio"
    config_class = MelConvConfig
    model_class = MelConvModel
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
        self.stride = math.prod(self.backbone_config.strides)  # mel frames in a step
        most = int(self.backbone_config.max_frames) // self.stride
        self.steps = window_steps(window, self.rate, self.stride * self.hop, most, "mel_conv")

    @property
    def depth(self) -> int:
        """Number of layers after the first."""
        return len(self.backbone_config.strides) - 1

    def options(self) -> dict[str, Any]:
        """See :meth:`Backbone.options`."""
        return {**super().options(), "window": self.window}

    def preprocessor(self) -> MelPreprocessor:
        """Return Whisper's log-mel; a window shorter than ``max_frames`` is not padded up to it."""
        return MelPreprocessor(
            rate=self.rate,
            unit_samples=self.steps * self.stride * self.hop,
            steps=self.steps,
            tokens=1,
            mels=int(self.backbone_config.num_mel_bins),
            frames=self.steps * self.stride,
            hop=self.hop,
            n_fft=int((self.preprocessing or {}).get("n_fft", 400)),
        )

    def arrange(self, x: Tensor, out: Any) -> Tensor:
        """Average one layer onto the steps: ``(U, T, D)`` -> ``(U, S, 1, D)``."""
        pooled = F.adaptive_avg_pool1d(x.transpose(1, 2), self.steps)  # (U, D, S)
        return pooled.transpose(1, 2)[:, :, None]
