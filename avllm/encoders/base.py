"""What an encoder is: a frozen backbone that turns prepared media into timed features, and the preprocessor beside it.

The preprocessor is a plain object without weights, so that loader workers can hold it; the encoder holds the weights.
"""

from __future__ import annotations

import importlib
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from avllm.tokens import EncoderInput, StreamBatch, Tokens

UNITS = 64  # frames or windows encoded at a time: more are hardly faster on a GPU, slower on a CPU, and need memory


class Preprocessor(Protocol):
    """Media of one clip -> EncoderInput. Picklable, deterministic, without weights."""

    medium: str  # "video" or "audio"

    def __call__(self, media: Any, duration: float) -> EncoderInput:
        """``media`` is data.media.Frames or data.media.Sound; ``duration`` the clip's length in seconds."""
        ...

    def settings(self) -> dict[str, Any]:
        """Everything that decides the result, JSON-able: saved with the processor and part of the cache's key."""
        ...


def part_name(part: object) -> str:
    """``module:Class`` of an object, the form under which its settings find it again."""
    return f"{type(part).__module__}:{type(part).__qualname__}"


def preprocessor_from_settings(settings: dict[str, Any]) -> Preprocessor:
    """Build a preprocessor again from what its ``settings()`` gave (``part`` names its class).

    Raises:
        ValueError: ``part`` is absent or names nothing that has ``from_settings``.
    """
    module, _, name = str(settings.get("part", "")).partition(":")
    cls = getattr(importlib.import_module(module), name, None) if module and name else None
    if cls is None or not hasattr(cls, "from_settings"):
        raise ValueError(
            f"preprocessor settings name {settings.get('part')!r}; expected module:Class of a preprocessor"
        )
    return cls.from_settings(settings)


class Encoder(nn.Module):
    """A backbone: subclasses set ``medium``, ``video`` or ``audio``, and implement `forward` and `preprocessor`.

    Constructing never reads weights: ``__init__`` takes the backbone's config (and options); :meth:`from_pretrained`
    takes a hub name or a folder.
    """

    medium: ClassVar[str]
    out_dim: int
    layer_names: list[str]

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """``(U, ...)`` -> ``{layer: (U, S, P, D)}``; S is the number of time steps in a unit (1 for frames)."""
        raise NotImplementedError(f"{type(self).__name__}.forward")

    def encode(self, batch: StreamBatch) -> dict[str, Tokens]:
        """Encode the units of all clips and lay them out by clip.

        Args:
            batch: the stream's units; given features are used as they are.

        Returns:
            ``{layer: Tokens}`` with x ``(B, T, P, D)``; the clock and the mask are those of the batch.
        """
        if batch.features is not None:
            dtype = next(self.parameters()).dtype
            return {k: Tokens(v.to(dtype), batch.mask, batch.span, batch.extra) for k, v in batch.features.items()}
        units = next(iter(batch.inputs.values())).shape[0]
        starts = range(0, max(units, 1), UNITS)
        parts = [self(**{k: v[first : first + UNITS] for k, v in batch.inputs.items()}) for first in starts]
        return {name: lay_out(torch.cat([part[name] for part in parts]), batch) for name in parts[0]}


def lay_out(x: Tensor, batch: StreamBatch) -> Tokens:
    """Units in a row ``(U_total, S, P, D)`` -> padded clips ``(B, T, P, D)``; what no clip owns stays zero, masked."""
    u, s, p, d = x.shape
    b, t = batch.span.shape[:2]
    out = x.new_zeros(b, t, p, d)
    first = torch.cumsum(batch.units, 0) - batch.units  # (B,)
    step = torch.arange(t, device=x.device)  # (T,)
    owned = step[None] < batch.units[:, None] * s  # (B, T)
    index = (first[:, None] * s + step[None])[owned]
    out[owned] = x.reshape(u * s, p, d)[index]
    return Tokens(out, batch.mask, batch.span, batch.extra)
