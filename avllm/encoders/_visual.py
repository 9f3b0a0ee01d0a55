"""Pictures and frames: the preprocessing and the token choice that the vision transformers share."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tvf
from transformers import PretrainedConfig

from avllm.encoders._backbone import Backbone
from avllm.encoders._regions import Placement, region_extra
from avllm.encoders.base import part_name
from avllm.tokens import EncoderInput

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
BICUBIC = 3  # PIL's number, which preprocessor_config.json uses
RESAMPLE = {0: InterpolationMode.NEAREST, 2: InterpolationMode.BILINEAR, 3: InterpolationMode.BICUBIC}
FEATURES = ("patch", "cls", "all", "pooled")


@dataclass(frozen=True)
class VisualPreprocessor:
    """Resize, centre crop, rescale, normalise: what the image processors of transformers do, for all frames at once.

    Attributes:
        shortest: the shorter side after resizing, the shape being kept; None resizes to ``size`` whatever the shape.
        size: (height, width) that the backbone gets; the centre is cut out where ``shortest`` is set.
        resample: PIL's number: 0 nearest, 2 bilinear, 3 bicubic; always with antialiasing.
        scale, mean, std: ``(x * scale - mean) / std``.
        tokens: P, how many tokens the encoder gives for a frame.
    """

    size: tuple[int, int]
    tokens: int
    shortest: int | None = None
    resample: int = BICUBIC
    scale: float = 1 / 255
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF
    medium: ClassVar[str] = "video"

    def __post_init__(self) -> None:
        if self.shortest is not None and self.shortest < max(self.size):
            raise ValueError(f"frames are resized to {self.shortest} pixels, too few for a crop of {self.size}")
        if self.resample not in RESAMPLE:
            raise ValueError(
                f"resample={self.resample}; expected one of {sorted(RESAMPLE)} (nearest, bilinear, bicubic)"
            )

    def __call__(self, media: Any, duration: float) -> EncoderInput:
        """Frames ``x`` uint8 (T, H, W, 3) and ``span`` (T, 2) -> ``pixel_values`` (T, 3, h, w), and their regions."""
        check_frames(media.x)
        x = self.resize(media.x.permute(0, 3, 1, 2))
        mask = torch.ones(x.shape[0], self.tokens, dtype=torch.bool)
        extra = region_extra(media.regions, media.span, self.placement(media.x.shape[1], media.x.shape[2]))
        pixels = normalise(x, self.scale, self.mean, self.std)
        return EncoderInput({"pixel_values": pixels}, media.span, mask, extra=extra)

    def placement(self, height: int, width: int) -> Placement:
        """Return how a picture of this size comes to lie in the encoder's input."""
        resized = self.size
        if self.shortest is not None:
            long = int(self.shortest * max(height, width) / min(height, width))
            resized = (self.shortest, long) if height <= width else (long, self.shortest)
        top, left = (resized[0] - self.size[0]) // 2, (resized[1] - self.size[1]) // 2
        return Placement(resized, top, left, self.size)

    def resize(self, x: Tensor) -> Tensor:
        """uint8 (T, 3, H, W) -> uint8 (T, 3, h, w)."""
        at = self.placement(x.shape[-2], x.shape[-1])
        x = tvf.resize(x, list(at.resized), interpolation=RESAMPLE[self.resample], antialias=True)
        return x[..., at.top : at.top + self.size[0], at.left : at.left + self.size[1]]

    def settings(self) -> dict[str, Any]:
        """Every field, JSON-able, and the class that reads them."""
        return {"part": part_name(self), **asdict(self)}

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> VisualPreprocessor:
        """The inverse of :meth:`settings`."""
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items() if k != "part"}
        return cls(**fields)


def check_frames(x: Tensor) -> None:
    """Raise ValueError unless x is uint8 (T, H, W, 3) with at least one frame."""
    if x.dtype != torch.uint8 or x.dim() != 4 or x.shape[-1] != 3 or x.shape[0] == 0:
        raise ValueError(f"frames are {x.dtype} {tuple(x.shape)}; expected torch.uint8 (T, H, W, 3) with T >= 1")


def normalise(x: Tensor, scale: float, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 (T, 3, H, W) -> float32 ``(x * scale - mean) / std``."""
    shift = torch.tensor(mean).view(-1, 1, 1)
    return (x.float() * scale - shift) / torch.tensor(std).view(-1, 1, 1)


def pair(value: Any) -> tuple[int, int]:
    """A side, a pair or transformers' size dict -> (height, width)."""
    if isinstance(value, dict):
        return int(value["height"]), int(value["width"])
    if isinstance(value, (list, tuple)):
        return int(value[0]), int(value[1])
    return int(value), int(value)


def average_onto(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Maps ``(U, D, H, W)`` -> ``(U, P, D)``, averaged onto P = rows x columns tokens, row by row."""
    u, d, h, w = x.shape
    if h % grid[0] or w % grid[1]:
        return adaptive_avg_pool2d(x, grid).flatten(2).transpose(1, 2)
    cells = x.reshape(u, d, grid[0], h // grid[0], grid[1], w // grid[1])  # the same means, much faster on CPUs
    return cells.mean((3, 5)).flatten(2).transpose(1, 2)


def checkpoint_resize(found: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """The resizing of a ``preprocessor_config.json``, in its old forms (bare numbers) too, so that ``size`` comes out.

    The ratio of the resized picture to the crop is kept where another size than the checkpoint's is asked for.
    """
    given = found.get("size", {"height": size[0], "width": size[1]})
    cropped = bool(found.get("do_center_crop", "crop_size" in found))
    if isinstance(given, int):
        given = {"shortest_edge": given} if cropped else {"height": given, "width": given}
    if "shortest_edge" not in given:
        return {"size": size}
    crop = pair(found.get("crop_size", given["shortest_edge"]))
    return {"size": size, "shortest": round(given["shortest_edge"] * min(size) / min(crop))}


class VisualBackbone(Backbone):
    """A vision transformer; each frame is one time step.

    Args:
        config, layers, preprocessing: see :class:`Backbone`.
        feature: which tokens of a frame: ``patch`` (the grid, row by row), ``cls`` (one), ``all`` (class and register
            tokens, then the grid) or ``pooled`` (the backbone's own pooled vector, one; last layer only).
        image_size: side in pixels that frames are brought to; None takes the checkpoint's. Another size than that of
            the position embedding interpolates it.
        side: average the grid onto ``side`` x ``side`` tokens; None keeps the backbone's own. ``patch`` only.

    Raises:
        ValueError: a feature that the family does not have; a side finer than the grid, or with another feature.
    """

    medium = "video"
    prefix: ClassVar[int] = 1  # tokens before the grid
    features: ClassVar[tuple[str, ...]] = FEATURES
    default_feature: ClassVar[str] = "patch"
    defaults: ClassVar[dict[str, Any]]  # the family's usual preprocessor_config.json, but for the sizes

    def __init__(
        self,
        config: PretrainedConfig | dict[str, Any],
        *,
        layers: list[int] | None = None,
        feature: str | None = None,
        image_size: int | None = None,
        side: int | None = None,
        preprocessing: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(config, layers=layers, preprocessing=preprocessing)
        self.feature = feature or self.default_feature
        self.asked_size = image_size
        self.side = side
        self._check_feature()
        self._check_side()

    def _check_feature(self) -> None:
        if self.feature not in self.features:
            raise ValueError(
                f"{type(self).__name__}: feature {self.feature!r}; expected one of {', '.join(self.features)}"
            )
        if self.feature == "pooled" and [i % (self.depth + 1) for i in self.layers] != [self.depth]:
            raise ValueError(
                f"{type(self).__name__}: pooled exists for the last layer only; leave out layers={self.layers}"
            )

    def _check_side(self) -> None:
        if self.side is None:
            return
        if self.feature != "patch":
            raise ValueError(
                f'{type(self).__name__}: side={self.side} averages the grid, which feature="patch" alone gives; '
                f"feature is {self.feature!r}. Leave one of the two out"
            )
        if not 1 <= self.side <= min(self.own_grid):
            raise ValueError(
                f"{type(self).__name__}: side={self.side}; expected 1 to {min(self.own_grid)}, as the backbone gives "
                f"{self.own_grid[0]} x {self.own_grid[1]} tokens"
            )

    def options(self) -> dict[str, Any]:
        """See :meth:`Backbone.options`."""
        return {**super().options(), "feature": self.feature, "image_size": self.asked_size, "side": self.side}

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) that the backbone gets."""
        if self.asked_size is not None:
            return pair(self.asked_size)
        return pair(self.backbone_config.image_size)

    @property
    def prefix_tokens(self) -> int:
        """Tokens before the grid."""
        return self.prefix

    def call_options(self) -> dict[str, Any]:
        """Interpolate the position embedding where the picture's size is not the one that it was made for."""
        same = self.image_size == pair(self.backbone_config.image_size)
        return {} if same else {"interpolate_pos_encoding": True}

    @property
    def own_grid(self) -> tuple[int, int]:
        """(rows, columns) of tokens that the backbone gives, from the config alone."""
        (height, width), (ph, pw) = self.image_size, pair(self.backbone_config.patch_size)
        return height // ph, width // pw

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of tokens that are given out."""
        return self.own_grid if self.side is None else (self.side, self.side)

    def tokens(self) -> int:
        """P, from the config alone."""
        if self.feature in ("cls", "pooled"):
            return 1
        return self.grid[0] * self.grid[1] + (self.prefix_tokens if self.feature == "all" else 0)

    def preprocessor(self) -> VisualPreprocessor:
        """The checkpoint's own preprocessing, or the family's."""
        found = {**self.defaults, **(self.preprocessing or {})}
        plain = not found.get("do_normalize", True)
        return VisualPreprocessor(
            tokens=self.tokens(),
            resample=int(found["resample"]),
            scale=float(found.get("rescale_factor", 1 / 255)),
            mean=(0.0,) * 3 if plain else tuple(found["image_mean"]),
            std=(1.0,) * 3 if plain else tuple(found["image_std"]),
            **checkpoint_resize(found, self.image_size),
        )

    def arrange(self, x: Tensor, out: Any) -> Tensor:
        """``(U, N, D)`` -> ``(U, 1, P, D)``."""
        if self.feature == "pooled":
            x = out.pooler_output[:, None]  # (U, 1, D)
        elif self.feature == "cls":
            x = x[:, :1]
        elif self.feature == "patch":
            x = x[:, self.prefix_tokens :]
        if self.side is not None:
            x = average_onto(x.unflatten(1, self.own_grid).permute(0, 3, 1, 2), self.grid)
        return x[:, None]  # (U, 1, P, D)
