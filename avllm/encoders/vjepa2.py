"""Encode clips of any length with V-JEPA 2: motion and physics, learned by predicting video."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from transformers import PretrainedConfig, VJEPA2Config, VJEPA2Model

from avllm.encoders._clip import TubeletBackbone, WholeClips
from avllm.encoders._visual import IMAGENET_MEAN, IMAGENET_STD


class VJEPA2Encoder(VJEPA2Model):
    """V-JEPA 2 without the predictor, which only its own training needs."""

    def __init__(self, config: VJEPA2Config) -> None:
        super().__init__(config)
        del self.predictor


class VJEPA2(WholeClips, TubeletBackbone):
    """V-JEPA 2 (Assran et al. 2025, arXiv:2506.09985): steps of two frames, any number of them.

    Its positions are rotary in time, height and width.

    Args:
        config, layers, preprocessing: see :class:`~avllm.encoders._backbone.Backbone`.
        image_size: side in pixels of the (square) frames; None takes the checkpoint's.
        side: see :class:`~avllm.encoders._visual.VisualBackbone`.
        window: frames that attention sees at once; longer clips are cut into windows of nearly
            equal length. None takes the checkpoint's ``frames_per_clip`` (64).

    Raises:
        ValueError: a window shorter than a step.
    """

    config_class = VJEPA2Config
    model_class = VJEPA2Encoder
    other_keys = (r"(vjepa2\.)?predictor\.", r"(pooler|classifier)\.")
    defaults: ClassVar[dict[str, Any]] = {
        "resample": 2,
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
        "size": {"shortest_edge": 292},
        "crop_size": {"height": 256, "width": 256},
    }

    def __init__(
        self,
        config: PretrainedConfig | dict[str, Any],
        *,
        layers: list[int] | None = None,
        image_size: int | None = None,
        side: int | None = None,
        window: int | None = None,
        preprocessing: dict[str, Any] | None = None,
    ) -> None:
        config = self.read_config(config)
        if image_size is not None:
            config.crop_size = image_size  # the rotary positions count patches by it
        super().__init__(
            config, layers=layers, image_size=image_size, side=side, preprocessing=preprocessing
        )
        self.window = window
        if window is not None and window < self.step_frames:
            raise ValueError(
                f"VJEPA2: window={window}; expected at least {self.step_frames}, the frames of a "
                "step"
            )

    def options(self) -> dict[str, Any]:
        """See :meth:`Backbone.options`."""
        options = super().options() | {"window": self.window}
        options.pop("feature")
        return options

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) that the backbone gets."""
        side = int(self.backbone_config.crop_size)
        return side, side

    def most_units(self) -> int:
        """See :meth:`WholeClips.most_units`."""
        frames = self.window or int(self.backbone_config.frames_per_clip)
        return max(1, frames // self.step_frames)

    def call_options(self) -> dict[str, Any]:
        """Leave out the predictor."""
        return {"skip_predictor": True}

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Encode the steps of one clip: ``pixel_values (U, frames, 3, h, w)``."""
        frames = inputs["pixel_values"].flatten(0, 1)
        return super().forward(pixel_values_videos=frames[None])

    def arrange(self, x: Tensor, out: Any) -> Tensor:
        """Make each step a unit: ``(1, U * patches, D)`` -> ``(U, 1, P, D)``."""
        return super().arrange(x, out).transpose(0, 1)
