"""The one value that flows through the model, features that know when they happened, and what encoders take in.

Side information (``extra``) travels beside the features by name: boxes of regions, text of frames, weights of steps.
Of one clip it is ``(T, ...)`` or ``(T, P, ...)``, or ``(1, ...)`` for the clip as a whole; of a batch ``(B, ...)`` of
that, padded with zeros (False) in every dimension: a producer whose entries may be absent adds a mask of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor


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
            raise ValueError(f"Tokens.mask has shape {tuple(self.mask.shape)}; expected {(b, t, p)} to go with x")
        if tuple(self.span.shape) != (b, t, 2):
            raise ValueError(f"Tokens.span has shape {tuple(self.span.shape)}; expected {(b, t, 2)} to go with x")
        for name, value in self.extra.items():
            if value.dim() < 2 or value.shape[0] != b or value.shape[1] not in (1, t):
                seen = f"Tokens.extra[{name!r}] has shape {tuple(value.shape)}"
                raise ValueError(f"{seen}; expected ({b}, {t}, ...) a step or ({b}, 1, ...) a clip, to go with x")

    def with_x(self, x: Tensor) -> Tokens:
        """Return the same clock, mask and side information with other features ``(B, T, P, D')``."""
        return replace(self, x=x)

    def flat(self) -> tuple[Tensor, Tensor]:
        """Features ``(B, N, D)`` and mask ``(B, N)`` with N = T*P, in time order."""
        return self.x.flatten(1, 2), self.mask.flatten(1, 2)  # (B, N, D), (B, N)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Tokens:
        """Move to a device; only the features change their dtype, the clock stays float32."""
        extra = {name: value.to(device) for name, value in self.extra.items()}
        return Tokens(self.x.to(device, dtype), self.mask.to(device), self.span.to(device), extra)

    def select(self, index: Tensor) -> Tokens:
        """Return the clips ``index (B',)`` long, with all that belongs to them."""
        extra = {name: value[index] for name, value in self.extra.items()}
        return Tokens(self.x[index], self.mask[index], self.span[index], extra)

    def present(self) -> Tensor:
        """``(B,)`` bool: which clips have this stream at all."""
        return self.mask.flatten(1).any(1)


class Grid(NamedTuple):
    """Everything about one clip's stream but its features: what a loader needs in order to count tokens.

    Attributes:
        span: ``(T, 2)`` float32 seconds of the clip.
        mask: ``(T, P)`` bool, True where a real token stands.
        at_most: the count is an upper bound, since content decides it, and the spans are not promised.
    """

    span: Tensor
    mask: Tensor
    at_most: bool = False

    @property
    def steps(self) -> int:
        """T, the number of time steps."""
        return int(self.span.shape[0])

    @property
    def tokens(self) -> int:
        """P, the number of tokens in a step."""
        return int(self.mask.shape[1])

    @property
    def places(self) -> int:
        """How many places this stream takes in the LLM's sequence."""
        return int(self.mask.sum())


@dataclass(frozen=True)
class EncoderInput:
    """One stream of one clip, ready for its encoder.

    Attributes:
        inputs: the backbone's keyword arguments, each ``(U, ...)`` over U units (frames, or windows of sound).
        span: ``(T, 2)`` seconds of the clip of each step that will come out.
        mask: ``(T, P)`` bool, which tokens will be real. T may be less than U * steps-a-unit: the tail of the last
            window of sound that lies after the clip's end is cut off.
        features: the encoder's own output ``{layer: (T, P, D)}`` where it is already known (cache); then ``inputs`` is
            empty.
        extra: side information by name, ``(T, ...)`` a step or ``(1, ...)`` for the clip.
        duration: seconds of the clip as it was decoded, which the last span may fall short of; 0 for a picture, None
            where the maker of this input did not say.
    """

    inputs: dict[str, Tensor]
    span: Tensor
    mask: Tensor
    features: dict[str, Tensor] | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)
    duration: float | None = None

    @property
    def grid(self) -> Grid:
        """The clock and the token count, as the processor folds it over the connector."""
        return Grid(self.span, self.mask)


@dataclass(frozen=True)
class StreamBatch:
    """One stream of a batch of B clips; clips without the stream have no units and an all-False mask.

    Attributes:
        inputs: ``(U_total, ...)`` each: the units of all clips, one after the other (no padding is encoded).
        units: ``(B,)`` how many units each clip has.
        span: ``(B, T, 2)``; mask: ``(B, T, P)``.
        features: ``{layer: (B, T, P, D)}`` where already known, else None.
        extra: side information by name, ``(B, T, ...)`` a step or ``(B, 1, ...)`` a clip.
    """

    inputs: dict[str, Tensor]
    units: Tensor
    span: Tensor
    mask: Tensor
    features: dict[str, Tensor] | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> StreamBatch:
        """Move every tensor (accelerate calls this on each batch); pinned ones while the CPU goes on."""
        return self._each(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> StreamBatch:
        """Page-locked copies, for the loader's pinning thread."""
        return self._each(lambda x: x.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> StreamBatch:
        """Return a copy with ``change`` applied to every tensor."""
        features = None if self.features is None else {k: change(v) for k, v in self.features.items()}
        return StreamBatch(
            inputs={k: change(v) for k, v in self.inputs.items()},
            units=change(self.units),
            span=change(self.span),
            mask=change(self.mask),
            features=features,
            extra={k: change(v) for k, v in self.extra.items()},
        )


def duration_of(clip: Mapping[str, EncoderInput]) -> float | None:
    """Return the seconds of a clip, given by stream; None where no stream says it."""
    known = [item.duration for item in clip.values() if item.duration is not None]
    return max(known, default=None)
