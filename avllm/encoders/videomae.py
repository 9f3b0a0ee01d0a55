"""Encode short clips with VideoMAE: what moves, and how."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PretrainedConfig, VideoMAEConfig, VideoMAEModel

from avllm.encoders._clip import TubeletBackbone
from avllm.encoders._visual import IMAGENET_MEAN, IMAGENET_STD
from avllm.encoders.base import UNITS


class VideoMAE(TubeletBackbone):
    """VideoMAE (Tong et al. 2022, arXiv:2203.12602): windows of 16 frames, steps of two.

    The position embedding has one size, so frames have the checkpoint's size and a window its
    number of frames. A longer clip is cut into windows. What the last window lacks is filled by
    repeating the last frame, and cut off again; the real frames of that window do see the filling,
    so a number of frames that fills its windows (16, 32) is best.

    Args:
        config, layers, preprocessing: see :class:`~avllm.encoders._backbone.Backbone`.
        side: see :class:`~avllm.encoders._visual.VisualBackbone`.
    """

    config_class = VideoMAEConfig
    model_class = VideoMAEModel
    other_keys = (
        r"(decoder|encoder_to_decoder|fc_norm|classifier)\.",
        r"(mask_token|(\w+\.)*position_embeddings)$",
    )
    defaults: ClassVar[dict[str, Any]] = {
        "resample": 2,
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
        "size": {"shortest_edge": 224},
        "crop_size": {"height": 224, "width": 224},
    }

    def __init__(
        self,
        config: PretrainedConfig | dict[str, Any],
        *,
        layers: list[int] | None = None,
        side: int | None = None,
        preprocessing: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(config, layers=layers, side=side, preprocessing=preprocessing)
        frames = int(self.backbone_config.num_frames)
        self.unit_steps = frames // self.step_frames
        self.units_at_once = max(1, UNITS // frames)

    def options(self) -> dict[str, Any]:
        """See :meth:`Backbone.options`."""
        return {"layers": list(self.layers), "side": self.side, "preprocessing": self.preprocessing}
