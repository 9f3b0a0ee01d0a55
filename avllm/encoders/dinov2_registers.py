"""Encode frames with DINOv2 whose registers keep its patches clean."""

from __future__ import annotations

from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from avllm.encoders.dinov2 import DINOv2


class DINOv2Registers(DINOv2):
    """DINOv2 with register tokens (Darcet et al. 2023, arXiv:2309.16588).

    Registers are part of ``feature="all"`` alone. Arguments: see
    :class:`~avllm.encoders._visual.VisualBackbone`.
    """

    config_class = Dinov2WithRegistersConfig
    model_class = Dinov2WithRegistersModel

    @property
    def prefix_tokens(self) -> int:
        """Class token and registers."""
        return 1 + int(self.backbone_config.num_register_tokens)
