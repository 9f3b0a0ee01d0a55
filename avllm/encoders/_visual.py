"""Preprocess pictures and frames, and choose tokens, for all vision transformers."""

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
from avllm.encoders.base import (
    MOST_SIDE,
    MOST_TOKENS,
    check_count,
    check_values,
    part_name,
)
from avllm.tokens import EncoderInput

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
IDENTITY: tuple[tuple[float, ...], tuple[float, ...]] = ((0.0,) * 3, (1.0,) * 3)  # mean, std
BICUBIC = 3  # PIL's number, which preprocessor_config.json uses
RESAMPLE = {
    0: InterpolationMode.NEAREST,
    2: InterpolationMode.BILINEAR,
    3: InterpolationMode.BICUBIC,
}
MAX_ASPECT = 8  # longer by shorter side of what is resized for a crop
FEATURES = ("patch", "cls", "all", "pooled")


@dataclass(frozen=True)
class VisualPreprocessor:
    """Resize, crop, rescale and normalise all frames at once, as transformers' image processors do.

    Attributes:
        size: (height, width) that the backbone gets; the centre is cut out where ``shortest`` is
            set.
        tokens: P, tokens that the encoder gives for a frame.
        shortest: the shorter side after resizing, the aspect ratio being kept; None resizes to
            ``size`` whatever the ratio.
        resample: PIL's number: 0 nearest, 2 bilinear, 3 bicubic; always with antialiasing.
        scale, mean, std: ``(x * scale - mean) / std``.
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
        for side in (*self.size, self.shortest or 1):
            check_count("a side of the picture", side, MOST_SIDE)
        check_count("tokens", self.tokens, MOST_TOKENS)
        if self.shortest is not None and self.shortest < max(self.size):
            raise ValueError(
                f"frames are resized to {self.shortest} pixels; expected at least {max(self.size)} "
                f"for a crop of {self.size}"
            )
        if self.resample not in RESAMPLE:
            raise ValueError(
                f"resample={self.resample}; "
                f"expected one of {sorted(RESAMPLE)} (nearest, bilinear, bicubic)"
            )

    def __call__(self, media: Any, duration: float) -> EncoderInput:
        """Return ``pixel_values`` (T, 3, h, w), and the regions of the frames as side information.

        Args:
            media: ``x`` uint8 (T, H, W, 3), ``span`` (T, 2) and ``regions``.
            duration: of the clip; not read.

        Raises:
            ValueError: frames of another type or shape.
        """
        return self.arrange(self.pixels(media.x), media.span, media)

    def pixels(self, x: Tensor) -> Tensor:
        """Resize, crop and normalise: uint8 (T, H, W, 3) -> float32 (T, 3, h, w).

        Raises:
            ValueError: frames of another type or shape.
        """
        check_frames(x)
        frames = x.shape[0]
        check_values(frames * 3 * self.size[0] * self.size[1], f"{frames} frames")
        resized = self.resize(x.permute(0, 3, 1, 2))
        return normalise(resized, self.scale, self.mean, self.std)

    def arrange(self, pixels: Tensor, span: Tensor, media: Any) -> EncoderInput:
        """Return the input of steps whose spans ``(T, 2)`` are given, with the media's regions."""
        mask = torch.ones(len(span), self.tokens, dtype=torch.bool)
        placement = self.placement(media.x.shape[1], media.x.shape[2])
        extra = region_extra(media.regions, span, placement)
        return EncoderInput({"pixel_values": pixels}, span, mask, extra=extra)

    def placement(self, height: int, width: int) -> Placement:
        """Return the place of a picture of this size in the encoder's input."""
        resized = self.size
        if self.shortest is not None:
            long = int(self.shortest * max(height, width) / min(height, width))
            resized = (self.shortest, long) if height <= width else (long, self.shortest)
        top = (resized[0] - self.size[0]) // 2
        left = (resized[1] - self.size[1]) // 2
        return Placement(resized, top, left, self.size)

    def resize(self, x: Tensor) -> Tensor:
        """Resize and crop: uint8 (T, 3, H, W) -> uint8 (T, 3, h, w)."""
        if self.shortest is not None:
            x = cut_strip(x)
        at = self.placement(x.shape[-2], x.shape[-1])
        mode = RESAMPLE[self.resample]
        x = tvf.resize(x, list(at.resized), interpolation=mode, antialias=True)
        return x[..., at.top : at.top + self.size[0], at.left : at.left + self.size[1]]

    def settings(self) -> dict[str, Any]:
        """Return every field, JSON-able, and the class that reads them."""
        return {"part": part_name(self), **asdict(self)}

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> VisualPreprocessor:
        """Build a preprocessor again from its :meth:`settings`."""
        return cls(**fields_of(settings))


def cut_strip(x: Tensor) -> Tensor:
    """Cut the ends off a picture ``(T, 3, H, W)`` that is far longer than wide.

    The crop takes its middle alone, and resizing all of a picture of 16,000 x 1 takes gigabytes.
    """
    height, width = x.shape[-2:]
    most = MAX_ASPECT * min(height, width)
    size = [min(height, most), min(width, most)]
    return x if size == [height, width] else tvf.center_crop(x, size)


def fields_of(settings: dict[str, Any]) -> dict[str, Any]:
    """Return a preprocessor's fields from its settings; JSON made lists of its tuples."""
    fields = {}
    for name, value in settings.items():
        if name != "part":
            fields[name] = tuple(value) if isinstance(value, list) else value
    return fields


def check_frames(x: Tensor) -> None:
    """Raise ValueError unless x is uint8 (T, H, W, 3) with at least one frame."""
    if x.dtype != torch.uint8 or x.dim() != 4 or x.shape[-1] != 3 or x.shape[0] == 0:
        raise ValueError(
            f"frames are {x.dtype} {tuple(x.shape)}; expected torch.uint8 (T, H, W, 3) with T >= 1"
        )


def normalise(x: Tensor, scale: float, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Return ``(x * scale - mean) / std``, float32, of uint8 (T, 3, H, W)."""
    shift = torch.tensor(mean).view(-1, 1, 1)
    return (x.float() * scale - shift) / torch.tensor(std).view(-1, 1, 1)


def pair(value: Any) -> tuple[int, int]:
    """Return (height, width) of a side, a pair or transformers' size dict."""
    if isinstance(value, dict):
        return int(value["height"]), int(value["width"])
    if isinstance(value, (list, tuple)):
        return int(value[0]), int(value[1])
    return int(value), int(value)


def average_onto(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Average maps ``(U, D, H, W)`` onto P = rows x columns tokens ``(U, P, D)``, row by row."""
    u, d, h, w = x.shape
    if h % grid[0] or w % grid[1]:
        return adaptive_avg_pool2d(x, grid).flatten(2).transpose(1, 2)
    # Cells of equal size: the same means as pooling, much faster on CPUs.
    cells = x.reshape(u, d, grid[0], h // grid[0], grid[1], w // grid[1])
    return cells.mean((3, 5)).flatten(2).transpose(1, 2)


def checkpoint_resize(settings: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """Return ``size`` and ``shortest`` of a preprocessor whose pictures get the given size.

    Where another size than the checkpoint's is asked for, the ratio of the resized picture to the
    crop stays that of the checkpoint. A rectangle is cut out of no picture: a picture that is
    narrower than it would not fill it.

    Args:
        settings: of ``preprocessor_config.json``, in its old form (bare numbers) too.
        size: (height, width) that the backbone gets.
    """
    given = settings.get("size", {"height": size[0], "width": size[1]})
    is_cropped = bool(settings.get("do_center_crop", "crop_size" in settings))
    if isinstance(given, int):
        given = {"shortest_edge": given} if is_cropped else {"height": given, "width": given}
    if "shortest_edge" not in given or size[0] != size[1]:
        return {"size": size}
    crop = pair(settings.get("crop_size", given["shortest_edge"]))
    return {"size": size, "shortest": round(given["shortest_edge"] * min(size) / min(crop))}


def checkpoint_size(settings: dict[str, Any] | None) -> tuple[int, int] | None:
    """Return (height, width) of a checkpoint's pictures; None where its settings say none.

    Args:
        settings: of ``preprocessor_config.json``, in its old form (bare numbers) too.
    """
    settings = settings or {}
    given = settings.get("size")
    if settings.get("do_center_crop", "crop_size" in settings):
        given = settings.get("crop_size")
    if given is None or (isinstance(given, dict) and "height" not in given):
        return None
    return pair(given)


class VisualBackbone(Backbone):
    """Encode frames with a vision transformer; each frame is one time step.

    Args:
        config, layers, preprocessing: see :class:`Backbone`.
        feature: tokens of a frame: ``patch`` (the grid, row by row), ``cls`` (one), ``all`` (class
            and register tokens, then the grid) or ``pooled`` (the backbone's pooled vector, one;
            last layer only).
        image_size: side in pixels, or [height, width], to which frames are resized; None takes the
            checkpoint's. Where it is not that of the position embedding, the embedding is
            interpolated.
        side: average the grid onto ``side`` x ``side`` tokens; None keeps the backbone's grid.
            ``patch`` only.

    Raises:
        ValueError: a feature that the family does not have; a side finer than the grid, or with
            another feature.
    """

    medium = "video"
    prefix: ClassVar[int] = 1  # tokens before the grid
    features: ClassVar[tuple[str, ...]] = FEATURES
    default_feature: ClassVar[str] = "patch"
    preprocessing_keys = (
        "do_normalize",
        "image_mean",
        "image_std",
        "resample",
        "rescale_factor",
        "size",
        "crop_size",
        "do_center_crop",
    )
    defaults: ClassVar[dict[str, Any]]  # the family's usual preprocessor_config.json

    def __init__(
        self,
        config: PretrainedConfig | dict[str, Any],
        *,
        layers: list[int] | None = None,
        feature: str | None = None,
        image_size: int | tuple[int, int] | None = None,
        side: int | None = None,
        preprocessing: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(config, layers=layers, preprocessing=preprocessing)
        self.feature = feature or self.default_feature
        self.asked_size = image_size
        self.side = side
        self.check_feature()
        self._check_side()

    def _check_side(self) -> None:
        if self.side is None:
            return
        if self.feature != "patch":
            raise ValueError(
                f"{type(self).__name__}: side={self.side} averages the grid, "
                f'which feature="patch" alone gives; feature is {self.feature!r}. '
                "Leave one of the two out"
            )
        rows, columns = self.own_grid
        if not 1 <= self.side <= min(rows, columns):
            raise ValueError(
                f"{type(self).__name__}: side={self.side}; expected 1 to {min(rows, columns)}, "
                f"as the backbone gives {rows} x {columns} tokens"
            )

    def options(self) -> dict[str, Any]:
        """See :meth:`Backbone.options`."""
        own = {"feature": self.feature, "image_size": self.asked_size, "side": self.side}
        return super().options() | own

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
        """Interpolate the position embedding where pictures have another size than it."""
        same = self.image_size == pair(self.backbone_config.image_size)
        return {} if same else {"interpolate_pos_encoding": True}

    @property
    def own_grid(self) -> tuple[int, int]:
        """(rows, columns) of tokens that the backbone gives, from the config alone."""
        height, width = self.image_size
        patch_height, patch_width = pair(self.backbone_config.patch_size)
        return height // patch_height, width // patch_width

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of tokens that are given out."""
        return self.own_grid if self.side is None else (self.side, self.side)

    def tokens(self) -> int:
        """Return P, from the config alone."""
        if self.feature in ("cls", "pooled"):
            return 1
        patches = self.grid[0] * self.grid[1]
        return patches + self.prefix_tokens if self.feature == "all" else patches

    def preprocessor(self) -> VisualPreprocessor:
        """Return the checkpoint's preprocessing, or the family's where it brings none."""
        return VisualPreprocessor(**self.picture_fields())

    def picture_fields(self) -> dict[str, Any]:
        """Return the fields of a :class:`VisualPreprocessor`, by the checkpoint and the config."""
        settings = {**self.defaults, **(self.preprocessing or {})}
        mean, std = IDENTITY
        if settings.get("do_normalize", True):
            mean = tuple(settings["image_mean"])
            std = tuple(settings["image_std"])
        return {
            "tokens": self.tokens(),
            "resample": int(settings["resample"]),
            "scale": float(settings.get("rescale_factor", 1 / 255)),
            "mean": mean,
            "std": std,
            **checkpoint_resize(settings, self.image_size),
        }

    def arrange(self, x: Tensor, out: Any) -> Tensor:
        """Choose the tokens of a layer: ``(U, N, D)`` -> ``(U, 1, P, D)``."""
        if self.feature == "pooled":
            x = out.pooler_output[:, None]  # (U, 1, D)
        elif self.feature == "cls":
            x = x[:, :1]
        elif self.feature == "patch":
            x = x[:, self.prefix_tokens :]
        if self.side is not None:
            x = average_onto(x.unflatten(1, self.own_grid).permute(0, 3, 1, 2), self.grid)
        return x[:, None]  # (U, 1, P, D)
