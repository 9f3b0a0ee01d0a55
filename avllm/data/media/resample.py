"""Change the sampling rate of a sound, by torchaudio's windowed sinc."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

import torch
import torchaudio

if TYPE_CHECKING:
    from torch import Tensor

FILTERS_AT_ONCE = 16  # neighbouring filters that one product applies


class Resampler(Protocol):
    """Change the sampling rate of a sound.

    Attributes:
        before: samples of silence that it needs before the sound.
        after: samples of silence that it needs after the sound.
    """

    before: int
    after: int

    def __call__(self, padded: Tensor) -> Tensor:
        """Resample ``(before + samples + after,)`` to ``(ceil(samples * new / old),)``."""
        ...


@lru_cache(maxsize=16)
def resampler(ratio: Fraction) -> Resampler:
    """Return a resampler that makes one sample of ``ratio`` old ones."""
    if ratio == 1:
        return _Same()
    # The transform holds its kernel, which functional.resample would compute at each call.
    transform = torchaudio.transforms.Resample(ratio.numerator, ratio.denominator)
    sparse = _Sparse(transform)
    return sparse if sparse.is_faster else _Whole(transform)


@dataclass(frozen=True)
class _FilterGroup:
    """Hold neighbouring filters: their first tap that is not 0, and ``(taps, filters)``."""

    first_tap: int
    weights: Tensor


class _Same:
    before = after = 0

    def __call__(self, padded: Tensor) -> Tensor:
        return padded


class _Whole:
    before = after = 0

    def __init__(self, transform: torchaudio.transforms.Resample) -> None:
        self.transform = transform

    def __call__(self, padded: Tensor) -> Tensor:
        return self.transform(padded)


class _Sparse:
    """Compute the same numbers without the kernel's zeros.

    44.1 to 16 kHz takes 160 filters of 475 taps, of which 33 in each filter are not 0. Neighbouring
    filters read nearly the same samples, and each filter reads again ``old`` samples further. So
    the output of some filters is a product of matrices, the first of which is a view of the sound.
    """

    def __init__(self, transform: torchaudio.transforms.Resample) -> None:
        self.old = transform.orig_freq // transform.gcd
        filters = transform.kernel[:, 0]  # (new, taps)
        self.new, self.taps = filters.shape
        self.before = transform.width
        self.after = transform.width + self.old
        self.groups: list[_FilterGroup] = []
        for group in filters.split(FILTERS_AT_ONCE):  # (filters, taps)
            used = (group != 0).any(0).nonzero()  # taps that some filter of the group reads
            first = int(used[0])
            last = int(used[-1]) + 1
            self.groups.append(_FilterGroup(first, group[:, first:last].T.contiguous()))

    @property
    def is_faster(self) -> bool:
        """Return whether the rows of the views do not overlap, so that nothing is copied."""
        return all(len(group.weights) <= self.old for group in self.groups)

    def __call__(self, padded: Tensor) -> Tensor:
        rows = (len(padded) - self.taps) // self.old + 1
        out = padded.new_empty(rows, self.new)
        columns = out.split(FILTERS_AT_ONCE, dim=1)  # views (rows, filters) of each group
        for group, column in zip(self.groups, columns, strict=True):
            shape = (rows, len(group.weights))  # row k begins k * old samples after the first
            samples = padded[group.first_tap :].as_strided(shape, (self.old, 1))
            torch.mm(samples, group.weights, out=column)
        length = len(padded) - self.before - self.after
        return out.view(-1)[: -(-self.new * length // self.old)]  # rounded up
