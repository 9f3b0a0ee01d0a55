"""Put logs and the texts about them side by side into one batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Sequence:
    """A log and texts about it; no text sees another.

    Attributes:
        bags: one list of token ids a position.
        labels: the id that is to come next, or -100.
        parts: 0 for the log, k for the k-th text after it.
        positions: of the position embedding; each text continues the log's.
    """

    bags: list[list[int]]
    labels: list[int]
    parts: list[int]
    positions: list[int]


@dataclass
class Padded:
    """Sequences of one length.

    Attributes:
        words: ids of all positions' bags, one after the other.
        starts: ``(R * L,)`` where each position's bag begins.
        labels: ``(R, L)``.
        parts: ``(R, L)``, -1 = padding.
        positions: ``(R, L)``.
    """

    words: Tensor
    starts: Tensor
    labels: Tensor
    parts: Tensor
    positions: Tensor


def pad(sequences: list[Sequence]) -> Padded:
    """Return sequences side by side."""
    length = max(len(s.bags) for s in sequences)
    bags = [bag for s in sequences for bag in s.bags + [[0]] * (length - len(s.bags))]
    starts = torch.tensor([0, *(len(b) for b in bags[:-1])]).cumsum(0)

    def side_by_side(rows: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([row + [fill] * (length - len(row)) for row in rows])

    return Padded(
        torch.tensor([word for bag in bags for word in bag]),
        starts,
        side_by_side([s.labels for s in sequences], -100),
        side_by_side([s.parts for s in sequences], -1),
        side_by_side([s.positions for s in sequences], 0),
    )


def visible(parts: Tensor) -> Tensor:
    """Return the additive attention mask ``(R, 1, L, L)``: causal, the log and the own text."""
    same = (parts[:, :, None] == parts[:, None]) | (parts[:, None] == 0)
    allowed = same & torch.ones(parts.shape[1], parts.shape[1], dtype=torch.bool).tril()
    return torch.zeros(allowed.shape).masked_fill(~allowed, -1e9)[:, None]
