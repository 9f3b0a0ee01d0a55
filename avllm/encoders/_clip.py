"""Prepare and encode frames several at a time, for backbones that see motion.

A step is one tubelet: ``frames`` frames, whose span begins with the first and ends with the last.
What a clip lacks of its last step is filled by repeating its last frame, so a picture is a step in
which nothing moves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from avllm.encoders._visual import VisualBackbone, VisualPreprocessor
from avllm.encoders.base import MOST_TOKENS, check_count, check_values
from avllm.tokens import EncoderInput, StreamBatch


@dataclass(frozen=True)
class ClipPreprocessor(VisualPreprocessor):
    """Join frames into steps, and steps into units of equal length.

    Steps that are filling alone have no span and no mask: the encoder's output for them is cut off.

    Attributes:
        frames: of a step.
        steps: S, of a unit.
        whole: the encoder gives one step a clip.
    """

    frames: int = 2
    steps: int = 1
    whole: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("frames", self.frames, MOST_TOKENS)
        check_count("steps", self.steps, MOST_TOKENS)

    def __call__(self, media: Any, duration: float) -> EncoderInput:
        """Return ``pixel_values`` (U, steps * frames, 3, h, w).

        Args:
            media: see :class:`~avllm.encoders._visual.VisualPreprocessor`.
            duration: not read.
        """
        unit = self.frames * self.steps
        units = -(-media.x.shape[0] // unit)
        check_values(units * unit * 3 * self.size[0] * self.size[1], f"{units} units of {unit}")
        x = self.pixels(media.x)  # (T, 3, h, w)
        filling = x[-1:].expand(units * unit - len(x), -1, -1, -1)
        x = torch.cat([x, filling]).unflatten(0, (units, unit))
        frames = len(media.span) if self.whole else self.frames
        return self.arrange(x, join_spans(media.span, frames), media)


def join_spans(span: Tensor, frames: int) -> Tensor:
    """Return the spans of steps of some frames each: ``(frames of the clip, 2)`` -> ``(T, 2)``."""
    first = torch.arange(0, len(span), frames)
    last = (first + frames - 1).clamp(max=len(span) - 1)
    return torch.stack([span[first, 0], span[last, 1]], 1)


class TubeletBackbone(VisualBackbone):
    """Encode frames with a transformer whose patches reach over several frames."""

    prefix = 0
    features = ("patch",)
    preprocessing_files: ClassVar[tuple[str, ...]] = (
        "video_preprocessor_config.json",
        "preprocessor_config.json",
        "processor_config.json",
    )
    unit_steps: int = 1

    @property
    def step_frames(self) -> int:
        """Frames of a step."""
        return int(self.backbone_config.tubelet_size)

    def call_options(self) -> dict[str, Any]:
        """Return nothing: no position embedding is interpolated."""
        return {}

    def preprocessor(self) -> ClipPreprocessor:
        """Return the preprocessing of pictures, and how many of them are a step and a unit."""
        return ClipPreprocessor(
            **self.picture_fields(), frames=self.step_frames, steps=self.unit_steps
        )

    def arrange(self, x: Tensor, out: Any) -> Tensor:
        """Separate the steps of a layer: ``(U, S * patches, D)`` -> ``(U, S, P, D)``."""
        patches = self.own_grid[0] * self.own_grid[1]
        steps = x.unflatten(1, (-1, patches))  # (U, S, patches, D)
        tokens = super().arrange(steps.flatten(0, 1), out)  # (U * S, 1, P, D)
        return tokens.squeeze(1).unflatten(0, steps.shape[:2])


class WholeClips(VisualBackbone):
    """Let attention see all of a clip at once; a unit is a step, and a call has those of one clip.

    Clips have different lengths, so they are encoded one after the other and none is padded.
    """

    def most_units(self) -> int:
        """Return how many steps attention sees at once; a longer clip is cut into equal windows."""
        return MOST_TOKENS

    def group_sizes(self, batch: StreamBatch) -> list[int]:
        """Return the steps of each clip, or of its windows."""
        sizes = []
        for units in batch.units.tolist():
            windows = max(1, -(-units // self.most_units()))
            size, longer = divmod(units, windows)
            sizes += [size + 1] * longer + [size] * (windows - longer)
        return [size for size in sizes if size > 0]
