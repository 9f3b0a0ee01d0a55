"""Hold features with their times (`Tokens`), and the inputs of encoders.

Side information (``extra``) travels beside the features by name: boxes of regions, text of frames,
weights of steps. For one clip it is ``(T, ...)`` or ``(T, P, ...)``, or ``(1, ...)`` for the clip
as a whole. For a batch it is ``(B, ...)`` of that, padded with zeros (False) in every dimension:
a producer whose entries may be absent adds its own mask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor

REGION_BOXES = "region_boxes"
"""``(T, K, 4)`` float32: K boxes in pixels of the encoder's input (x0, y0, x1, y1)."""
REGION_MASK = "region_mask"
"""``(T, K)`` bool, True where the box is in the step."""
REGION_MARKS = "region_marks"
"""``(1, K)`` long, the number of each box's mark plus 1; without it, marks are 0, 1, 2, ..."""
PICTURE_SIZE = "picture_size"
"""``(1, 2)`` long, height and width of the encoder's input."""


@dataclass(frozen=True)
class Tokens:
    """Timed features of one stream of a batch of clips.

    Attributes:
        x: features, ``(B, T, P, D)``: clips, time steps, tokens of a step, width.
        mask: ``(B, T, P)`` bool, True where the token is real.
        span: ``(B, T, 2)`` float32, start and end of each step in seconds of the clip.
        extra: side information by name, ``(B, T, ...)`` a step or ``(B, 1, ...)`` a clip.
    """

    x: Tensor
    mask: Tensor
    span: Tensor
    extra: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.x.dim() != 4:
            raise ValueError(f"Tokens.x has shape {tuple(self.x.shape)}; expected (B, T, P, D)")
        b, t, p, _ = self.x.shape
        if tuple(self.mask.shape) != (b, t, p):
            seen = tuple(self.mask.shape)
            raise ValueError(f"Tokens.mask has shape {seen}; expected {(b, t, p)} to go with x")
        if tuple(self.span.shape) != (b, t, 2):
            seen = tuple(self.span.shape)
            raise ValueError(f"Tokens.span has shape {seen}; expected {(b, t, 2)} to go with x")
        for name, value in self.extra.items():
            if value.dim() < 2 or value.shape[0] != b or value.shape[1] not in (1, t):
                seen = tuple(value.shape)
                expected = f"({b}, {t}, ...) a step or ({b}, 1, ...) a clip, to go with x"
                raise ValueError(f"Tokens.extra[{name!r}] has shape {seen}; expected {expected}")

    def with_x(self, x: Tensor) -> Tokens:
        """Return other features ``(B, T, P, D')`` with this clock, mask and side information."""
        return replace(self, x=x)

    def flat(self) -> tuple[Tensor, Tensor]:
        """Return features ``(B, N, D)`` and mask ``(B, N)`` with N = T*P, in time order."""
        return self.x.flatten(1, 2), self.mask.flatten(1, 2)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Tokens:
        """Move to a device; ``dtype`` applies to the features alone: the clock stays float32."""
        extra = {name: value.to(device) for name, value in self.extra.items()}
        return Tokens(self.x.to(device, dtype), self.mask.to(device), self.span.to(device), extra)

    def select(self, index: Tensor) -> Tokens:
        """Return the clips ``index`` ``(B',)`` long, with mask, clock and side information."""
        extra = {name: value[index] for name, value in self.extra.items()}
        return Tokens(self.x[index], self.mask[index], self.span[index], extra)

    def present(self) -> Tensor:
        """Return ``(B,)`` bool, True for clips that have this stream."""
        return self.mask.flatten(1).any(1)


class Grid(NamedTuple):
    """Clock and mask of one clip's stream, without features: a loader counts tokens with it.

    Attributes:
        span: ``(T, 2)`` float32 seconds of the clip.
        mask: ``(T, P)`` bool, True where the token is real.
        at_most: the count is an upper bound, since content decides it, and the spans may differ.
    """

    span: Tensor
    mask: Tensor
    at_most: bool = False

    @property
    def steps(self) -> int:
        """Return T, the number of time steps."""
        return int(self.span.shape[0])

    @property
    def tokens(self) -> int:
        """Return P, the number of tokens in a step."""
        return int(self.mask.shape[1])

    @property
    def places(self) -> int:
        """Return the number of tokens that this stream takes in the LLM's sequence."""
        return int(self.mask.sum())


@dataclass(frozen=True)
class EncoderInput:
    """One stream of one clip, ready for its encoder.

    Attributes:
        inputs: the backbone's keyword arguments, each ``(U, ...)`` over U units (frames, or windows
            of sound).
        span: ``(T, 2)`` seconds of the clip, for each step of the encoder's output.
        mask: ``(T, P)`` bool, True for tokens that will be real. T may be less than
            U * steps-a-unit: the tail of the last window of sound after the clip's end is cut off.
        features: the encoder's output ``{layer: (T, P, D)}`` if it comes from a cache; then
            ``inputs`` is empty.
        extra: side information by name, ``(T, ...)`` a step or ``(1, ...)`` for the clip.
        duration: seconds of the decoded clip, which may be more than the end of the last span;
            0 for a picture, None if the maker of this input does not give it.
    """

    inputs: dict[str, Tensor]
    span: Tensor
    mask: Tensor
    features: dict[str, Tensor] | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)
    duration: float | None = None

    @property
    def grid(self) -> Grid:
        """Return the clock and the mask, from which the connector computes its token count."""
        return Grid(self.span, self.mask)


@dataclass(frozen=True)
class StreamBatch:
    """One stream of a batch of B clips; a clip without it has no units and an all-False mask.

    Attributes:
        inputs: ``(U_total, ...)`` each: the units of all clips, concatenated (no padding is
            encoded).
        units: ``(B,)``, the number of units of each clip.
        span: ``(B, T, 2)`` seconds.
        mask: ``(B, T, P)`` bool.
        features: ``{layer: (B, T, P, D)}`` if they come from a cache, else None.
        extra: side information by name, ``(B, T, ...)`` a step or ``(B, 1, ...)`` a clip.
    """

    inputs: dict[str, Tensor]
    units: Tensor
    span: Tensor
    mask: Tensor
    features: dict[str, Tensor] | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> StreamBatch:
        """Move every tensor, pinned ones asynchronously; accelerate calls this on each batch."""
        return self._each(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> StreamBatch:
        """Return page-locked copies; the loader's pinning thread calls this."""
        return self._each(lambda x: x.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> StreamBatch:
        """Return a copy with ``change`` applied to every tensor."""
        features = None
        if self.features is not None:
            features = {layer: change(x) for layer, x in self.features.items()}
        return StreamBatch(
            inputs={name: change(x) for name, x in self.inputs.items()},
            units=change(self.units),
            span=change(self.span),
            mask=change(self.mask),
            features=features,
            extra={name: change(x) for name, x in self.extra.items()},
        )


def duration_of(clip: Mapping[str, EncoderInput]) -> float | None:
    """Return the seconds of a clip, given by stream; None if no stream has its duration."""
    durations = [item.duration for item in clip.values() if item.duration is not None]
    return max(durations, default=None)
