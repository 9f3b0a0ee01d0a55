"""Encode pictures in their own aspect ratio with SigLIP 2 NaFlex."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchvision.transforms.v2 import functional as tvf
from transformers import PretrainedConfig, Siglip2VisionConfig, Siglip2VisionModel

from avllm.encoders._backbone import Backbone
from avllm.encoders._regions import Placement, region_extra
from avllm.encoders._visual import HALF, IDENTITY, RESAMPLE, check_frames, fields_of, normalise
from avllm.encoders.base import (
    MOST_SIDE,
    MOST_TOKENS,
    check_count,
    check_values,
    part_name,
)
from avllm.tokens import EncoderInput


@dataclass(frozen=True)
class NaFlexPreprocessor:
    """Resize in the picture's aspect ratio, cut into patches, and pad to ``max_patches`` of them.

    Attributes:
        patch: side of a patch in pixels.
        max_patches: P of every picture, padding included.
        pooled: the encoder gives one token a picture instead of its patches.
        resample, scale, mean, std: as in :class:`~avllm.encoders._visual.VisualPreprocessor`.
    """

    patch: int
    max_patches: int
    pooled: bool = False
    resample: int = 2
    scale: float = 1 / 255
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF
    medium: ClassVar[str] = "video"

    def __post_init__(self) -> None:
        check_count("the side of a patch", self.patch, MOST_SIDE)
        check_count("max_patches", self.max_patches, MOST_TOKENS)

    def __call__(self, media: Any, duration: float) -> EncoderInput:
        """Return ``pixel_values`` (T, P, 3 * patch * patch), their mask and the grid's shape.

        Args:
            media: ``x`` uint8 (T, H, W, 3), ``span`` (T, 2) and ``regions``.
            duration: of the clip; not read.

        Raises:
            ValueError: frames of another type or shape.
        """
        check_frames(media.x)
        steps, height, width = media.x.shape[:3]
        check_values(steps * 3 * self.patch**2 * self.max_patches, f"{steps} frames")
        rows, columns = naflex_grid(height, width, self.patch, self.max_patches)
        size = (rows * self.patch, columns * self.patch)
        mode = RESAMPLE[self.resample]
        x = media.x.permute(0, 3, 1, 2)
        x = tvf.resize(x, list(size), interpolation=mode, antialias=True)
        x = patches(normalise(x, self.scale, self.mean, self.std), self.patch)
        real = x.shape[1]
        mask = (torch.arange(self.max_patches) < real).expand(steps, -1)
        inputs = {
            "pixel_values": pad(x, (0, 0, 0, self.max_patches - real)),
            "pixel_attention_mask": mask.int(),
            "spatial_shapes": torch.tensor([[rows, columns]]).repeat(steps, 1),
        }
        tokens = torch.ones(steps, 1, dtype=torch.bool) if self.pooled else mask.clone()
        uncropped = Placement(resized=size, top=0, left=0, size=size)
        extra = region_extra(media.regions, media.span, uncropped)
        return EncoderInput(inputs, media.span, tokens, extra=extra)

    def settings(self) -> dict[str, Any]:
        """Return every field, JSON-able, and the class that reads them."""
        return {"part": part_name(self), **asdict(self)}

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> NaFlexPreprocessor:
        """Build a preprocessor again from its :meth:`settings`."""
        return cls(**fields_of(settings))


def patches(x: Tensor, side: int) -> Tensor:
    """Cut (T, 3, H, W) into (T, H / side * W / side, side * side * 3), row by row."""
    x = x.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # (T, 3, rows, side, columns, side)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def naflex_grid(
    height: int, width: int, patch: int, most: int, precision: float = 1e-5
) -> tuple[int, int]:
    """Return (rows, columns) of the finest grid in the picture's aspect ratio.

    The scale is found by halving, with the bounds and precision of SigLIP 2's code, so that both
    round alike.

    Args:
        height, width: of the picture. patch: side of a patch, in pixels.
        most: patches that the grid may have.
    """

    def grid(scale: float) -> tuple[int, int]:
        rows = max(1, math.ceil(height * scale / patch))
        columns = max(1, math.ceil(width * scale / patch))
        return rows, columns

    low = precision / 10
    high = 100.0
    while high - low >= precision:
        middle = (low + high) / 2
        rows, columns = grid(middle)
        if rows * columns <= most:
            low = middle
        else:
            high = middle
    return grid(low)


class SigLIP2(Backbone):
    """SigLIP 2 NaFlex (Tschannen et al. 2025, arXiv:2502.14786): pictures of any aspect ratio.

    Pictures of different shape share a batch; ``Tokens.mask`` says which patches are real.
    Checkpoints of a fixed resolution (``siglip2-base-patch16-224``) are of type ``siglip``.

    Args:
        config, layers, preprocessing: see :class:`~avllm.encoders._backbone.Backbone`.
        feature: ``patch``, or ``pooled`` (the attention-pooling head's vector; last layer only).
        max_patches: P; None means the checkpoint's (256).

    Raises:
        ValueError: an unknown feature, or pooled with inner layers or without the head.
    """

    medium = "video"
    config_class = Siglip2VisionConfig
    model_class = Siglip2VisionModel
    tower = "vision_config"
    other_keys = (r"text_model\.", r"logit_(scale|bias)$")
    features = ("patch", "pooled")
    preprocessing_keys = (
        "do_normalize",
        "image_mean",
        "image_std",
        "resample",
        "rescale_factor",
        "max_num_patches",
    )

    def __init__(
        self,
        config: PretrainedConfig | dict[str, Any],
        *,
        layers: list[int] | None = None,
        feature: str = "patch",
        max_patches: int | None = None,
        preprocessing: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(config, layers=layers, preprocessing=preprocessing)
        self.feature = feature
        self.max_patches = max_patches
        self.check_feature()
        if feature == "pooled" and not self.backbone.use_head:
            raise ValueError(
                'SigLIP2: feature="pooled" needs the pooling head, '
                "but the config has vision_use_head=False"
            )

    def options(self) -> dict[str, Any]:
        """See :meth:`Backbone.options`."""
        return {**super().options(), "feature": self.feature, "max_patches": self.max_patches}

    def preprocessor(self) -> NaFlexPreprocessor:
        """Return the preprocessing that the config and the checkpoint's settings ask for."""
        settings = self.preprocessing or {}
        usual_patches = settings.get("max_num_patches", self.backbone_config.num_patches)
        mean, std = IDENTITY
        if settings.get("do_normalize", True):
            mean = tuple(settings.get("image_mean", HALF))
            std = tuple(settings.get("image_std", HALF))
        return NaFlexPreprocessor(
            patch=int(self.backbone_config.patch_size),
            max_patches=self.max_patches or int(usual_patches),
            pooled=self.feature == "pooled",
            resample=int(settings.get("resample", 2)),
            scale=float(settings.get("rescale_factor", 1 / 255)),
            mean=mean,
            std=std,
        )

    def arrange(self, x: Tensor, out: Any) -> Tensor:
        """Bring a layer ``(U, P, D)``, or the pooled vector, into the form ``(U, 1, P, D)``."""
        if self.feature == "pooled":
            return out.pooler_output[:, None, None]
        return x[:, None]
