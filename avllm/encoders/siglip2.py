"""SigLIP 2 NaFlex: pictures in their own shape."""

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
from avllm.encoders._visual import HALF, RESAMPLE, check_frames, normalise
from avllm.encoders.base import part_name
from avllm.tokens import EncoderInput


@dataclass(frozen=True)
class NaFlexPreprocessor:
    """Resize to at most ``max_patches`` whole patches, keeping the shape; cut into patches; pad to ``max_patches``.

    Attributes:
        patch: side of a patch in pixels. max_patches: P of every picture, padding included.
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

    def __call__(self, media: Any, duration: float) -> EncoderInput:
        """Frames ``x`` uint8 (T, H, W, 3) -> ``pixel_values`` (T, P, 3 * patch * patch), their mask and grid shape."""
        check_frames(media.x)
        rows, columns = naflex_grid(media.x.shape[1], media.x.shape[2], self.patch, self.max_patches)
        size = [rows * self.patch, columns * self.patch]
        x = tvf.resize(media.x.permute(0, 3, 1, 2), size, interpolation=RESAMPLE[self.resample], antialias=True)
        x = patches(normalise(x, self.scale, self.mean, self.std), self.patch)
        steps, real = x.shape[:2]
        mask = (torch.arange(self.max_patches) < real).expand(steps, -1)
        inputs = {
            "pixel_values": pad(x, (0, 0, 0, self.max_patches - real)),
            "pixel_attention_mask": mask.int(),
            "spatial_shapes": torch.tensor([[rows, columns]]).repeat(steps, 1),
        }
        tokens = torch.ones(steps, 1, dtype=torch.bool) if self.pooled else mask.clone()
        whole = Placement((size[0], size[1]), 0, 0, (size[0], size[1]))
        return EncoderInput(inputs, media.span, tokens, extra=region_extra(media.regions, media.span, whole))

    def settings(self) -> dict[str, Any]:
        """Every field, JSON-able, and the class that reads them."""
        return {"part": part_name(self), **asdict(self)}

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> NaFlexPreprocessor:
        """The inverse of :meth:`settings`."""
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items() if k != "part"}
        return cls(**fields)


def patches(x: Tensor, side: int) -> Tensor:
    """(T, 3, H, W) -> (T, H / side * W / side, side * side * 3), row by row, colours innermost."""
    x = x.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # (T, 3, rows, side, columns, side)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def naflex_grid(height: int, width: int, patch: int, most: int, precision: float = 1e-5) -> tuple[int, int]:
    """(rows, columns) of the finest grid of whole patches in the picture's shape that has at most ``most`` patches.

    The scale is found by halving, with the bounds and precision of SigLIP 2's own code, so that both round alike.
    """

    def grid(scale: float) -> tuple[int, int]:
        return max(1, math.ceil(height * scale / patch)), max(1, math.ceil(width * scale / patch))

    low, high = precision / 10, 100.0
    while high - low >= precision:
        middle = (low + high) / 2
        rows, columns = grid(middle)
        low, high = (middle, high) if rows * columns <= most else (low, middle)
    return grid(low)


class SigLIP2(Backbone):
    """SigLIP 2 NaFlex (Tschannen et al. 2025, arXiv:2502.14786): any aspect ratio, up to ``max_patches`` patches.

    Pictures of different shape share a batch; ``Tokens.mask`` says which patches are real. Checkpoints of a fixed
    resolution (``siglip2-base-patch16-224``) are of type ``siglip``.

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
        self.feature, self.max_patches = feature, max_patches
        if feature not in self.features:
            raise ValueError(f"SigLIP2: feature {feature!r}; expected one of {', '.join(self.features)}")
        if feature == "pooled" and [i % (self.depth + 1) for i in self.layers] != [self.depth]:
            raise ValueError(f"SigLIP2: pooled exists for the last layer only; leave out layers={self.layers}")
        if feature == "pooled" and not self.backbone.use_head:
            raise ValueError(
                'SigLIP2: feature="pooled" needs the pooling head, but the config has vision_use_head=False'
            )

    def options(self) -> dict[str, Any]:
        """See :meth:`Backbone.options`."""
        return {**super().options(), "feature": self.feature, "max_patches": self.max_patches}

    def preprocessor(self) -> NaFlexPreprocessor:
        """NaFlex, from the config and the checkpoint's own settings."""
        found = self.preprocessing or {}
        plain = not found.get("do_normalize", True)
        return NaFlexPreprocessor(
            patch=int(self.backbone_config.patch_size),
            max_patches=self.max_patches or int(found.get("max_num_patches", self.backbone_config.num_patches)),
            pooled=self.feature == "pooled",
            resample=int(found.get("resample", 2)),
            scale=float(found.get("rescale_factor", 1 / 255)),
            mean=(0.0,) * 3 if plain else tuple(found.get("image_mean", HALF)),
            std=(1.0,) * 3 if plain else tuple(found.get("image_std", HALF)),
        )

    def arrange(self, x: Tensor, out: Any) -> Tensor:
        """``(U, N, D)`` -> ``(U, 1, P, D)``."""
        return out.pooler_output[:, None, None] if self.feature == "pooled" else x[:, None]
