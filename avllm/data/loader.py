"""Which items stand in which batch: a function of (seed, position) alone, so that any step can be started from.

The mixture is one endless sequence of items (``mixture.py``). Optimizer step s takes the next
``processes * accumulate * batch_size`` of them, micro-step by micro-step and rank by rank. So two processes see at each
step what one process sees with twice the accumulation, the number of workers changes nothing, and resuming is skipping
numbers. A limit in tokens cuts such a micro batch into several and touches nothing else: no lengths have to be known
beforehand, and the step's rows, loss and gradients stay what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from avllm.data.collate import Batch
from avllm.data.dataset import Loaded, SampleDataset
from avllm.data.items import Bad
from avllm.data.mixture import Order
from avllm.data.row import Row


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
    """Picklable: items that were loaded -> the micro batches that they make, one if nothing splits them.

    Rows of several variants, and more tokens than the limit, make several.

    Args:
        collate: ``collate(rows) -> Batch``.
        empty: a row without targets and media, used when no row is left.
        join: ``join(rows) -> rows``, fewer and longer ones that share sequences; None gives each its own.
        max_tokens: most tokens of a micro batch, padding included; None for no limit.
    """

    collate: Callable[[list[Row]], Batch]
    empty: Row
    join: Callable[[list[Row]], list[Row]] | None = None
    max_tokens: int | None = None

    def __call__(self, loaded: list[Loaded]) -> list[MicroBatch]:
        """Join the good rows; the bad ones are carried along with the first micro batch."""
        rows = [row for item in loaded for row in item.rows]
        if self.join and rows:
            rows = self.join(rows)
        micros = []
        for group in self._split(rows) or [[self.empty]]:
            tokens = 0 if group[0] is self.empty else sum(len(row.input_ids) for row in group)
            micros.append(MicroBatch(self.collate(group), [], 0, tokens))
        micros[0].bad = [bad for item in loaded for bad in item.bad]
        micros[0].seen = sum(item.seen for item in loaded)
        return micros

    def _split(self, rows: list[Row]) -> list[list[Row]]:
        """Return the rows by variant, and within the limit of tokens."""
        groups = []
        for variant in dict.fromkeys(row.variant for row in rows):
            alike = [row for row in rows if row.variant == variant]
            if self.max_tokens is None:
                groups.append(alike)
                continue
            lengths = [len(row.input_ids) for row in alike]
            groups += [[alike[i] for i in places] for places in by_tokens(lengths, self.max_tokens)]
        return groups


def by_tokens(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Places of ``lengths`` in batches of which each, padded to its longest, has at most ``most`` tokens.

    The longest first, each batch as full as it gets, so that rows of similar length share one and padding is small; a
    row longer than ``most`` stands alone. Places ascend within a batch.
    """
    batches: list[list[int]] = []
    longest = 0
    for place in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or longest * (len(batches[-1]) + 1) > most:
            batches.append([])
            longest = lengths[place]
        batches[-1].append(place)
    return [sorted(batch) for batch in batches]


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
