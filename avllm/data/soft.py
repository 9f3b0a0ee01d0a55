"""Soft targets: places of rows whose next token is a distribution over a few tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Soft:
    """Weights of tokens at places of rows, one entry a token, ``(S,)`` each.

    A place's label is its heaviest token, so that masks and counts of targets know nothing of this;
    where the label is not trained on, neither is its distribution.

    Attributes:
        row: long, of a batch; 0 in a row.
        place: long, of the token in its row.
        id: long. weight: float32; those of a place sum to 1.
    """

    row: Tensor
    place: Tensor
    id: Tensor
    weight: Tensor

    @classmethod
    def of(cls, weights: Sequence[tuple[int, Mapping[int, float]]]) -> Soft | None:
        """Make the soft targets of a row from (place, weight by token id), or None without any."""
        entries = [(place, i, weight) for place, by_id in weights for i, weight in by_id.items()]
        if not entries:
            return None
        places, ids, values = zip(*entries, strict=True)
        place = torch.tensor(places)
        return cls(
            torch.zeros_like(place),
            place,
            torch.tensor(ids),
            torch.tensor(values, dtype=torch.float32),
        )

    def moved(self, by: int, row: int = 0) -> Soft:
        """Return the same ``by`` places later, in the given row."""
        return Soft(torch.full_like(self.row, row), self.place + by, self.id, self.weight)

    @property
    def first(self) -> int:
        """Return the first place that has any."""
        return int(self.place.min())

    def to(self, device: torch.device | str) -> Soft:
        """Move every tensor."""
        values = (self.row, self.place, self.id, self.weight)
        return Soft(*(value.to(device, non_blocking=True) for value in values))

    def pin_memory(self) -> Soft:
        """Return page-locked copies."""
        return Soft(
            self.row.pin_memory(),
            self.place.pin_memory(),
            self.id.pin_memory(),
            self.weight.pin_memory(),
        )


def join(several: Sequence[Soft | None]) -> Soft | None:
    """Put soft targets together; None where there are none."""
    present = [soft for soft in several if soft is not None]
    if not present:
        return None
    return Soft(
        torch.cat([soft.row for soft in present]),
        torch.cat([soft.place for soft in present]),
        torch.cat([soft.id for soft in present]),
        torch.cat([soft.weight for soft in present]),
    )
