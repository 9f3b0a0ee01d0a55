"""Encode sound with Qwen2-Audio's encoder: Whisper's, trained further for sounds of all kinds."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from transformers import Qwen2AudioEncoder, Qwen2AudioEncoderConfig

from avllm.encoders.whisper import Whisper


class Qwen2Audio(Whisper):
    """The encoder of Qwen2-Audio (Chu et al. 2024, arXiv:2407.10759): 25 tokens a second.

    The last layer is averaged over pairs of Whisper's steps, and inner layers here as well. Loads
    out of a full Qwen2-Audio checkpoint. Arguments: see :class:`~avllm.encoders.whisper.Whisper`.
    """

    config_class = Qwen2AudioEncoderConfig
    model_class = Qwen2AudioEncoder
    tower = "audio_config"
    key_mapping: ClassVar[dict[str, str]] = {r"^(model\.)?audio_tower\.": ""}
    other_keys = (r"(model\.)?(multi_modal_projector|language_model)\.", r"lm_head\.")
    stride = 4

    @property
    def out_dims(self) -> dict[str, int]:
        """Width of each layer given out."""
        return dict.fromkeys(self.layer_names, int(self.backbone_config.d_model))

    def arrange(self, x: Tensor, out: Any) -> Tensor:
        """Average inner layers as the last: ``(U, positions [/ 2], D)`` -> ``(U, S, 1, D)``."""
        if x.shape[1] == self.backbone_config.max_source_positions:
            x = x.unflatten(1, (-1, 2)).mean(2)
        return super().arrange(x, out)
