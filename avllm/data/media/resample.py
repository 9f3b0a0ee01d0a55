"""Another sampling rate, by torchaudio's windowed sinc."""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

import torch
import torchaudio

if TYPE_CHECKING:
    from torch import Tensor

NEIGHBOURS = 16  # filters that are applied together


class Resampler(Protocol):
    """Gives a sound another sampling rate.

    Attributes:
        before, after: samples of silence that it wants around the sound.
    """

    before: int
    after: int

    def __call__(self, padded: Tensor) -> Tensor:
        """``(before + samples + after,)`` -> ``(ceil(samples * new / old),)``."""
        ...


@lru_cache(maxsize=16)
def resampler(ratio: Fraction) -> Resampler:
    """For ``ratio`` old samples to a new one."""
    if ratio == 1:
        return _Same()
    # functional.resample with its kernel kept
    whole = _Whole(torchaudio.transforms.Resample(ratio.numerator, ratio.denominator))
    sparse = _Sparse(whole.how)
    return sparse if sparse.pays else whole


class _Same:
    before = after = 0

    def __call__(self, padded: Tensor) -> Tensor:
        return padded


class _Whole:
    before = after = 0

    def __init__(self, how: torchaudio.transforms.Resample) -> None:
        self.how = how

    def __call__(self, padded: Tensor) -> Tensor:
        return self.how(padded)


class _Sparse:
    """The same numbers without the zeros: 44.1 to 16 kHz takes 160 filters of 475 taps, of which 33 each are not 0.

    Filters that stand next to each other see nearly the same samples, and each of them returns every ``old`` samples:
    a product of matrices of which the first is a view of the sound.
    """

    def __init__(self, whole: torchaudio.transforms.Resample) -> None:
        self.old, self.width = whole.orig_freq // whole.gcd, whole.width
        filters = whole.kernel[:, 0]  # (new, taps)
        self.new, self.taps = filters.shape
        self.before, self.after = self.width, self.width + self.old
        self.groups: list[tuple[int, Tensor]] = []  # first tap, (taps of it, filters)
        for part in filters.split(NEIGHBOURS):
            used = (part != 0).any(0).nonzero()
            first, last = int(used[0]), int(used[-1]) + 1
            self.groups.append((first, part[:, first:last].T.contiguous()))

    @property
    def pays(self) -> bool:
        """Whether the view's rows do not overlap, so that nothing is copied."""
        return all(len(taps) <= self.old for _, taps in self.groups)

    def __call__(self, padded: Tensor) -> Tensor:
        rows = (len(padded) - self.taps) // self.old + 1
        out = padded.new_empty(rows, self.new)
        for (first, taps), into in zip(self.groups, out.split(NEIGHBOURS, dim=1), strict=True):
            torch.mm(padded[first:].as_strided((rows, len(taps)), (self.old, 1)), taps, out=into)
        return out.view(-1)[: -(-self.new * (len(padded) - self.before - self.after) // self.old)]
