"""Define an encoder, which turns prepared media into timed features, and its preprocessor.

The encoder holds the frozen weights. The preprocessor has none, so that loader workers can hold it.
"""

from __future__ import annotations

import importlib
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from avllm.errors import UserError
from avllm.tokens import EncoderInput, StreamBatch, Tokens

# Frames or windows encoded at a time. More need memory, and are hardly faster on a GPU, slower on a
# CPU.
UNITS = 64
MOST_SIDE = 8_192  # pixels of what a preprocessor resizes to
MOST_TOKENS = 65_536  # of a step
MOST_VALUES = 2**32  # that a preprocessor makes of a clip, 17 GB of float32


class Preprocessor(Protocol):
    """Turn the media of one clip into an encoder's input.

    It is picklable and deterministic, and has no weights.
    """

    medium: str  # "video" or "audio"

    def __call__(self, media: Any, duration: float) -> EncoderInput:
        """Prepare one clip.

        Args:
            media: data.media.Frames or data.media.Sound. duration: seconds of the clip.
        """
        ...

    def settings(self) -> dict[str, Any]:
        """Return everything that decides the result, JSON-able.

        It is saved with the processor, and is part of the feature cache's key.
        """
        ...


def check_count(name: str, value: int, most: int) -> None:
    """Refuse a count of a preprocessor's settings, from which the size of its result follows.

    Raises:
        ValueError: it is below 1 or above ``most``.
    """
    if not 1 <= value <= most:
        raise ValueError(f"{name} is {value}; expected 1 to {most}")


def check_values(values: int, of: str) -> None:
    """Refuse an input that would take too much memory, before it is made.

    Raises:
        UserError: ``too_large``, it has more than ``MOST_VALUES``.
    """
    if values > MOST_VALUES:
        raise UserError(
            f"{of} become {values} numbers; the limit is {MOST_VALUES}. Take a shorter clip, "
            "fewer frames or a smaller picture",
            reason="too_large",
        )


def part_name(part: object) -> str:
    """Return ``module:Class`` of an object, by which its class is found when it is built again."""
    return f"{type(part).__module__}:{type(part).__qualname__}"


def preprocessor_from_settings(settings: dict[str, Any]) -> Preprocessor:
    """Build a preprocessor again from its ``settings()`` (``part`` names its class).

    Raises:
        ValueError: ``part`` is absent or names nothing that has ``from_settings``.
    """
    module, _, name = str(settings.get("part", "")).partition(":")
    cls = getattr(importlib.import_module(module), name, None) if module and name else None
    if cls is None or not hasattr(cls, "from_settings"):
        raise ValueError(
            f"preprocessor settings name {settings.get('part')!r}; "
            "expected module:Class of a preprocessor"
        )
    return cls.from_settings(settings)


class Encoder(nn.Module):
    """Encode one medium; a new family sets ``medium`` and implements `forward` and `preprocessor`.

    Constructing never reads weights: ``__init__`` takes the backbone's config (and options);
    :meth:`from_pretrained` takes a hub name or a folder.

    Attributes:
        medium: ``video`` or ``audio``.
        units_at_once: the most units in a call of `forward`.
        out_dim: D of the main stream. layer_names: names of the layers that `forward` gives.
    """

    medium: ClassVar[str]
    units_at_once: int = UNITS
    out_dim: int
    layer_names: list[str]

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Encode units ``(U, ...)`` -> ``{layer: (U, S, P, D)}``; S = time steps a unit."""
        raise NotImplementedError(f"{type(self).__name__}.forward")

    def preprocessor(self) -> Any:
        """Return the :class:`Preprocessor` that makes this encoder's inputs from media."""
        raise NotImplementedError(f"{type(self).__name__}.preprocessor")

    def encode(self, batch: StreamBatch) -> dict[str, Tokens]:
        """Encode the units of all clips and lay them out by clip.

        Args:
            batch: the stream's units; features that it brings instead are used unchanged.

        Returns:
            ``{layer: Tokens}`` with x ``(B, T, P, D)``, and clock and mask of the batch.
        """
        if batch.features is not None:
            dtype = next(self.parameters()).dtype
            return {
                name: Tokens(x.to(dtype), batch.mask, batch.span, batch.extra)
                for name, x in batch.features.items()
            }
        by_layer: dict[str, list[Tensor]] = {}
        first = 0
        for size in self.group_sizes(batch):
            inputs = {name: x[first : first + size] for name, x in batch.inputs.items()}
            first += size
            for name, x in self(**inputs).items():
                by_layer.setdefault(name, []).append(x)
        return {name: lay_out(torch.cat(pieces), batch) for name, pieces in by_layer.items()}

    def group_sizes(self, batch: StreamBatch) -> list[int]:
        """Return the number of units in each call of `forward`, over the units of all clips."""
        units = next(iter(batch.inputs.values())).shape[0]
        starts = range(0, max(units, 1), self.units_at_once)
        return [min(self.units_at_once, units - start) for start in starts]


def lay_out(x: Tensor, batch: StreamBatch) -> Tokens:
    """Lay units out by clip: ``(U_total, S, P, D)`` -> ``(B, T, P, D)``, zero in padding.

    Clip b owns ``batch.units[b]`` units in a row, each of S time steps.
    """
    u, s, p, d = x.shape
    b, t = batch.span.shape[:2]
    out = x.new_zeros(b, t, p, d)
    first = torch.cumsum(batch.units, 0) - batch.units  # (B,), each clip's first unit
    step = torch.arange(t, device=x.device)  # (T,)
    owned = step[None] < batch.units[:, None] * s  # (B, T)
    index = (first[:, None] * s + step[None])[owned]  # the time step among all units' steps
    out[owned] = x.reshape(u * s, p, d)[index]
    return Tokens(out, batch.mask, batch.span, batch.extra)
