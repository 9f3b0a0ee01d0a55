"""Encode sound with BEATs: events and scenes, learned from AudioSet."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torchaudio
from torch import Tensor
from transformers import PretrainedConfig

from avllm.encoders._audio import FbankPreprocessor, window_steps
from avllm.encoders._beats_model import BeatsConfig, BeatsModel
from avllm.encoders._published_file import PublishedBackbone
from avllm.published import Published, PublishedError, read_settings

FRAME_RATE = 100  # Kaldi frames a second
LOUDNESS = 2**15  # the published filter banks are of 16-bit samples
ENCODER = "encoder."
DISTANCES = "self_attn.relative_attention_bias.weight"
PUBLISHED_NAMES = (
    (r"^stem\.", "patch_embedding."),
    (r"^stem_norm\.", "layer_norm."),
    (r"^projection\.", "post_extract_proj."),
    (r"^positions\.parametrizations\.weight\.original0$", ENCODER + "pos_conv.0.weight_g"),
    (r"^positions\.parametrizations\.weight\.original1$", ENCODER + "pos_conv.0.weight_v"),
    (r"^positions\.bias$", ENCODER + "pos_conv.0.bias"),
    (r"^norm\.", ENCODER + "layer_norm."),
    (r"^distances\.weight$", ENCODER + "layers.0." + DISTANCES),
    (r"^blocks\.(\d+)\.(\w+_proj|grep_linear|grep_a)", ENCODER + r"layers.\1.self_attn.\2"),
    (r"^blocks\.(\d+)\.attn_norm", ENCODER + r"layers.\1.self_attn_layer_norm"),
    (r"^blocks\.(\d+)\.mlp_norm", ENCODER + r"layers.\1.final_layer_norm"),
    (r"^blocks\.", ENCODER + "layers."),
)
"""Beginnings of the model's names and of those in the published files."""

SETTINGS = {
    "embed_dim": "embedding_size",
    "encoder_embed_dim": "hidden_size",
    "encoder_layers": "num_hidden_layers",
    "encoder_attention_heads": "num_attention_heads",
    "encoder_ffn_embed_dim": "intermediate_size",
    "input_patch_size": "patch_size",
    "conv_bias": "stem_bias",
    "conv_pos": "conv_pos",
    "conv_pos_groups": "conv_pos_groups",
    "num_buckets": "num_buckets",
    "max_distance": "max_distance",
}
"""The published files' settings, and the config's fields."""

EXPECTED = {
    "activation_fn": "gelu",
    "layer_norm_first": False,
    "deep_norm": True,
    "relative_position_embedding": True,
    "gru_rel_pos": True,
}
"""Settings that are the same in every published file; the model has no other form."""


@dataclass(frozen=True)
class BeatsPreprocessor(FbankPreprocessor):
    """Compute BEATs' filter banks: Kaldi's, of samples in the range of 16 bits."""

    def prepare(self, x: Tensor) -> dict[str, Tensor]:
        """Return ``input_values`` (frames, mels), silence after the end, and ``step_mask`` (S,)."""
        real = -(-x.shape[0] * self.steps // self.unit_samples)  # steps that begin before the end
        x = F.pad(x, (0, self.reach - x.shape[0])) * LOUDNESS
        bank = torchaudio.compliance.kaldi.fbank(
            x[None], sample_frequency=self.rate, num_mel_bins=self.mels
        )
        step_mask = torch.arange(self.steps) < real
        return {"input_values": (bank - self.mean) / (2 * self.std), "step_mask": step_mask.long()}


class BEATs(PublishedBackbone):
    """BEATs (Chen et al. 2022, arXiv:2212.09058): 6.25 steps a second of 8 bands of the spectrum.

    ``name`` is a published file (``BEATs_iter3_plus_AS2M.pt``; a fine-tuned one as well, whose
    classifier is not read), or a folder that ``save_pretrained`` wrote. A step hears the 16 frames
    of 10 ms of its patch, and attention all of the window.

    Args:
        config, layers, preprocessing: see :class:`~avllm.encoders._backbone.Backbone`.
        window: seconds of sound in a window, rounded down to whole steps; the published models
            were trained on 10. Choose a short one for short clips: padding costs time.
    """

    medium = "audio"
    config_class = BeatsConfig
    model_class = BeatsModel
    preprocessing_keys = ("sampling_rate", "mean", "std")

    def __init__(
        self,
        config: PretrainedConfig | dict[str, Any],
        *,
        layers: list[int] | None = None,
        window: float = 10.0,
        preprocessing: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(config, layers=layers, preprocessing=preprocessing)
        self.window = window
        self.rate = int((preprocessing or {}).get("sampling_rate", 16_000))
        self.patch = int(self.backbone_config.patch_size)
        self.bands = int(self.backbone_config.num_mel_bins) // self.patch
        self.step_samples = self.patch * self.rate // FRAME_RATE
        # The backbone takes any length, so the window is the most that it takes.
        most = max(1, int(window * self.rate / self.step_samples + 1e-6))
        self.steps = window_steps(window, self.rate, self.step_samples, most, "BEATs")

    def options(self) -> dict[str, Any]:
        """See :meth:`Backbone.options`."""
        return super().options() | {"window": self.window}

    def preprocessor(self) -> BeatsPreprocessor:
        """Return Kaldi filter banks, by the config and the checkpoint's settings."""
        settings = self.preprocessing or {}
        frames = self.steps * self.patch
        return BeatsPreprocessor(
            rate=self.rate,
            unit_samples=self.steps * self.step_samples,
            steps=self.steps,
            tokens=self.bands,
            mels=int(self.backbone_config.num_mel_bins),
            frames=frames,
            used=frames,
            mean=float(settings.get("mean", 15.41663)),
            std=float(settings.get("std", 6.55582)),
        )

    def arrange(self, x: Tensor, out: Any) -> Tensor:
        """Separate the steps: ``(U, S * bands, D)`` -> ``(U, S, bands, D)``."""
        return x.unflatten(1, (self.steps, self.bands))

    @classmethod
    def published_config(cls, file: Published) -> BeatsConfig:
        """Return the config of a published file by its settings (``cfg``).

        Raises:
            PublishedError: ``settings``: they are missing, or of an architecture that BEATs is not.
        """
        settings = read_settings(file.path, "cfg")
        for name, expected in EXPECTED.items():
            seen = settings.get(name)
            if seen != expected:
                raise PublishedError(
                    f"{file.path}: {name} is {seen!r}; expected {expected!r}, as in every "
                    "published BEATs. Is it another model?",
                    reason="settings",
                )
        settings.setdefault("max_distance", 1280)  # as in the published code
        return BeatsConfig(
            **{SETTINGS[name]: settings[name] for name in SETTINGS & settings.keys()}
        )

    @classmethod
    def take(cls, file: Published, model: BeatsModel) -> dict[str, Tensor]:
        """See :meth:`PublishedBackbone.take`."""
        state = file.take(model.state_dict(), published_name)
        # All layers share the distances' table, and it is published with each of them.
        for number in range(1, len(model.blocks)):
            name = f"{ENCODER}layers.{number}.{DISTANCES}"
            if name in file and not torch.equal(file.tensor(name), state["distances.weight"]):
                raise PublishedError(
                    f"{file.path}: {name} differs from that of layer 0; expected the same, as in "
                    "every published BEATs. Is it another model?",
                    reason="weights",
                )
        file.leave([r"predictor\..*"])
        file.refuse_rest()
        return state


def published_name(own: str) -> str:
    """Return the name in a published file of a tensor of the model."""
    for pattern, theirs in PUBLISHED_NAMES:
        if re.match(pattern, own):
            return re.sub(pattern, theirs, own)
    return own
