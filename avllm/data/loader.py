"""Which items stand in which batch: a function of (seed, position) alone, so that any step can be started from.

The mixture is one endless sequence of items. Optimizer step s takes the next ``processes * accumulate * batch_size``
of them, micro-step by micro-step and rank by rank. So two processes see at each step what one process sees with twice
the accumulation, the number of workers changes nothing, and resuming is skipping numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from avllm.data.dataset import Bad, Loaded, SampleDataset

if TYPE_CHECKING:
    from avllm.data.collate import Batch


class Order:
    """The endless, seeded sequence of item numbers of a mixture.

    Each source is an endless chain of its own permutations. An epoch takes ``round(weight * size)`` items from the
    chain of each source, going on where the epoch before stopped, and shuffles them together: weight 1 is every item
    once an epoch, 2 twice, 0.5 every second epoch.

    Args:
        sizes: items of each source, numbered one after the other.
        weights: of each source.
        seed: of the run.
        shuffle: False keeps the order of the manifests (validation).
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int, shuffle: bool = True) -> None:
        self.sizes, self.seed, self.shuffle = list(sizes), seed, shuffle
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)[:-1]]).astype(np.int64)
        self.shares = [max(1, round(w * n)) for w, n in zip(weights, sizes, strict=True)]
        self._epochs: dict[int, np.ndarray] = {}

    @property
    def epoch_length(self) -> int:
        """Items in an epoch of the mixture."""
        return sum(self.shares)

    def epoch(self, number: int) -> np.ndarray:
        """``(epoch_length,)`` item numbers of an epoch."""
        if number not in self._epochs:
            parts = [self._share(source, number) for source in range(len(self.sizes))]
            items = np.concatenate(parts)
            if self.shuffle:
                items = np.random.default_rng([self.seed, 1, number]).permutation(items)
            self._epochs = {k: v for k, v in self._epochs.items() if k >= number - 1} | {number: items}
        return self._epochs[number]

    def _share(self, source: int, epoch: int) -> np.ndarray:
        size, share = self.sizes[source], self.shares[source]
        first = epoch * share
        copies = range(first // size, (first + share - 1) // size + 1)
        chain = np.concatenate([self._permutation(source, copy) for copy in copies])
        skip = first - copies.start * size
        return self.starts[source] + chain[skip : skip + share]

    def _permutation(self, source: int, copy: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.sizes[source])
        return np.random.default_rng([self.seed, 2, source, copy]).permutation(self.sizes[source])

    def items(self, first: int, count: int) -> list[int]:
        """``count`` items from place ``first`` of the endless sequence."""
        out: list[int] = []
        while count > 0:
            epoch, place = divmod(first, self.epoch_length)
            part = self.epoch(epoch)[place : place + count]
            out += part.tolist()
            first, count = first + len(part), count - len(part)
        return out


@dataclass(frozen=True)
class Cut:
    """How the endless sequence is cut into micro batches, and which of them are this process's."""

    batch_size: int
    accumulate: int = 1
    world_size: int = 1
    rank: int = 0

    @property
    def step_items(self) -> int:
        """Items of one optimizer step, over all processes."""
        return self.batch_size * self.accumulate * self.world_size

    def first(self, step: int, micro: int) -> int:
        """The place in the sequence where this process's micro batch begins."""
        return step * self.step_items + (micro * self.world_size + self.rank) * self.batch_size


class MicroBatches:
    """Batch sampler: this process's micro batches of the steps from ``start`` up to ``stop``.

    Each entry is an item's number and its place in the endless sequence, which augmentation follows from.
    """

    def __init__(self, order: Order, cut: Cut, start: int, stop: int) -> None:
        self.order, self.cut, self.start, self.stop = order, cut, start, stop

    def __len__(self) -> int:
        return (self.stop - self.start) * self.cut.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.stop):
            for micro in range(self.cut.accumulate):
                first = self.cut.first(step, micro)
                items = self.order.items(first, self.cut.batch_size)
                yield [(item, first + n) for n, item in enumerate(items)]


class OncePerItem:
    """Batch sampler for validation: the first ``count`` items once, the same number of batches on every process."""

    def __init__(self, count: int, cut: Cut) -> None:
        self.count, self.cut = count, cut

    def __len__(self) -> int:
        return -(-self.count // (self.cut.batch_size * self.cut.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        for number in range(len(self)):
            first = (number * self.cut.world_size + self.cut.rank) * self.cut.batch_size
            yield list(range(first, min(first + self.cut.batch_size, self.count)))


@dataclass
class MicroBatch:
    """A collated micro batch and what was left out of it.

    Attributes:
        batch: made of the good rows; when there are none, of one row without targets, so that every process goes on.
        bad: rows left out; seen: manifest rows looked at; tokens: real tokens in the batch.
    """

    batch: Batch
    bad: list[Bad]
    seen: int
    tokens: int

    def pin_memory(self) -> MicroBatch:
        """Page-locked, for the loader's pinning thread."""
        return MicroBatch(self.batch.pin_memory(), self.bad, self.seen, self.tokens)


@dataclass
class Collate:
    """Picklable: items that were loaded -> MicroBatch.

    Args:
        collate: ``collate(rows) -> Batch``.
        empty: a row without targets and media, used when no row is left.
    """

    collate: Callable[[list[Any]], Any]
    empty: Any

    def __call__(self, loaded: list[Loaded]) -> MicroBatch:
        """Join what is good; carry along what is not."""
        rows = [row for item in loaded for row in item.rows]
        batch = self.collate(rows or [self.empty])
        bad = [b for item in loaded for b in item.bad]
        tokens = sum(len(row.input_ids) for row in rows)
        return MicroBatch(batch, bad, sum(item.seen for item in loaded), tokens)


def build_loader(dataset: SampleDataset, batches: Any, collate: Collate, num_workers: int) -> DataLoader:
    """A DataLoader whose result does not depend on ``num_workers``; nothing in it draws a random number.

    Args:
        dataset: items.
        batches: MicroBatches or OncePerItem.
        collate: joins rows.
        num_workers: processes that decode; 0 decodes in this one.
    """
    return DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if num_workers else None,
        generator=torch.Generator(),  # its own: the loader would else draw a seed from the global one
    )
