"""The one value that flows through the model, features that know when they happened, and what encoders take in."""

from __future__ import annotations

from dataclasses import dataclass, replace
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
    """

    x: Tensor
    mask: Tensor
    span: Tensor

    def __post_init__(self) -> None:
        if self.x.dim() != 4:
            raise ValueError(f"Tokens.x has shape {tuple(self.x.shape)}; expected (B, T, P, D)")
        b, t, p, _ = self.x.shape
        if tuple(self.mask.shape) != (b, t, p):
            raise ValueError(f"Tokens.mask has shape {tuple(self.mask.shape)}; expected {(b, t, p)} to go with x")
        if tuple(self.span.shape) != (b, t, 2):
            raise ValueError(f"Tokens.span has shape {tuple(self.span.shape)}; expected {(b, t, 2)} to go with x")

    def with_x(self, x: Tensor) -> Tokens:
        """The same clock and mask with other features ``(B, T, P, D')``."""
        return replace(self, x=x)

    def flat(self) -> tuple[Tensor, Tensor]:
        """Features ``(B, N, D)`` and mask ``(B, N)`` with N = T*P, in time order."""
        return self.x.flatten(1, 2), self.mask.flatten(1, 2)  # (B, N, D), (B, N)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Tokens:
        """Move to a device; only the features change their dtype, the clock stays float32."""
        return Tokens(self.x.to(device, dtype), self.mask.to(device), self.span.to(device))

    def present(self) -> Tensor:
        """``(B,)`` bool: which clips have this stream at all."""
        return self.mask.flatten(1).any(1)


class Grid(NamedTuple):
    """Everything about one clip's stream but its features: what a loader needs in order to count tokens.

    Attributes:
        span: ``(T, 2)`` float32 seconds of the clip.
        mask: ``(T, P)`` bool, True where a real token stands.
    """

    span: Tensor
    mask: Tensor

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
            window of sound that lies behind the clip's end is cut off.
        features: the encoder's own output ``{layer: (T, P, D)}`` where it is already known (cache); then ``inputs`` is
            empty.
    """

    inputs: dict[str, Tensor]
    span: Tensor
    mask: Tensor
    features: dict[str, Tensor] | None = None

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
    """

    inputs: dict[str, Tensor]
    units: Tensor
    span: Tensor
    mask: Tensor
    features: dict[str, Tensor] | None = None

    def to(self, device: torch.device | str) -> StreamBatch:
        """Move every tensor (accelerate calls this on each batch); pinned ones while the CPU goes on."""

        def move(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=True)

        moved = None if self.features is None else {k: move(v) for k, v in self.features.items()}
        inputs = {k: move(v) for k, v in self.inputs.items()}
        return StreamBatch(inputs, move(self.units), move(self.span), move(self.mask), moved)

    def pin_memory(self) -> StreamBatch:
        """Page-locked copies, for the loader's pinning thread."""
        feats = None if self.features is None else {k: v.pin_memory() for k, v in self.features.items()}
        inputs = {k: v.pin_memory() for k, v in self.inputs.items()}
        return StreamBatch(inputs, self.units.pin_memory(), self.span.pin_memory(), self.mask.pin_memory(), feats)
