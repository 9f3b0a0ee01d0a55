"""Choose the items of each batch from (seed, position) alone, so that a run can start at any step.

The mixture is one endless sequence of items (``mixture.py``). Optimizer step s takes the next
``processes * accumulate * batch_size`` of them, micro-step by micro-step and rank by rank. So two
processes see at each step what one process sees with twice the accumulation, the number of workers
changes nothing, and to resume is to skip numbers. A limit in tokens only cuts such a micro batch
into several: no lengths have to be known beforehand, and the step's rows, loss and gradients stay
the same.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any

import torch
from torch.utils.data import DataLoader

from avllm.data.collate import Batch
from avllm.data.dataset import Loaded, SampleDataset
from avllm.data.items import Bad
from avllm.data.mixture import Order
from avllm.data.row import Row

GRACE = 60
"""Seconds that a worker goes on after a SIGTERM, for the step that the run finishes."""


@dataclass(frozen=True)
class Cut:
    """Cut of the endless sequence into micro batches, and this process's share of them."""

    batch_size: int
    accumulate: int = 1
    world_size: int = 1
    rank: int = 0

    @property
    def step_items(self) -> int:
        """Items of one optimizer step, over all processes."""
        return self.batch_size * self.accumulate * self.world_size

    def first(self, step: int, micro: int) -> int:
        """Return the place in the sequence at which this process's micro batch begins."""
        return step * self.step_items + (micro * self.world_size + self.rank) * self.batch_size


class MicroBatches:
    """Sample this process's micro batches of the steps from ``start`` up to ``stop``.

    Each entry is an item's number and its place in the endless sequence; augmentation draws its
    random numbers from the place.
    """

    def __init__(self, order: Order, cut: Cut, start: int, stop: int) -> None:
        self.order = order
        self.cut = cut
        self.start = start
        self.stop = stop

    def __len__(self) -> int:
        return (self.stop - self.start) * self.cut.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.stop):
            for micro in range(self.cut.accumulate):
                first = self.cut.first(step, micro)
                items = self.order.items(first, self.cut.batch_size)
                yield [(item, first + n) for n, item in enumerate(items)]


class OncePerItem:
    """Sample each of some items once, for validation: as many batches on every process.

    Args:
        items: their numbers, in the order in which they are sampled.
        cut: into batches.
    """

    def __init__(self, items: Sequence[int], cut: Cut) -> None:
        self.items = list(items)
        self.cut = cut

    def __len__(self) -> int:
        return -(-len(self.items) // (self.cut.batch_size * self.cut.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        for number in range(len(self)):
            first = (number * self.cut.world_size + self.cut.rank) * self.cut.batch_size
            yield self.items[first : first + self.cut.batch_size]


@dataclass(frozen=True)
class MicroBatch:
    """A collated micro batch, and the count of the rows that it was made from.

    Where loaded items make several micro batches, the first one counts their rows, so that sums
    over micro batches count each row once.

    Attributes:
        batch: made of the good rows; when there are none, of one row without targets, so that every
            process goes on.
        tokens: real tokens in the batch.
        bad: rows left out.
        seen: manifest rows looked at.
    """

    batch: Batch
    tokens: int
    bad: list[Bad] = field(default_factory=list)
    seen: int = 0

    def pin_memory(self) -> MicroBatch:
        """Return page-locked tensors, for the loader's pinning thread."""
        return replace(self, batch=self.batch.pin_memory())


@dataclass
class Collate:
    """Make micro batches of loaded items; picklable.

    Items make one micro batch, or several where rows have several variants or exceed the limit in
    tokens.

    Args:
        collate: ``collate(rows) -> Batch``.
        empty: a row without targets and media, used when no row is left.
        join: ``join(rows) -> rows``, fewer and longer ones that share sequences; None for none.
        max_tokens: most tokens of a micro batch, padding included; None for no limit.
    """

    collate: Callable[[list[Row]], Batch]
    empty: Row
    join: Callable[[list[Row]], list[Row]] | None = None
    max_tokens: int | None = None

    def __call__(self, loaded: list[Loaded]) -> list[MicroBatch]:
        """Return the micro batches of the good rows, at least one; the first counts all rows."""
        rows = [row for item in loaded for row in item.rows]
        if self.join and rows:
            rows = self.join(rows)
        micros = []
        for group in self._split(rows):
            tokens = sum(len(row.input_ids) for row in group)
            micros.append(MicroBatch(self.collate(group), tokens))
        if not micros:
            micros = [MicroBatch(self.collate([self.empty]), tokens=0)]
        bad = [row for item in loaded for row in item.bad]
        seen = sum(item.seen for item in loaded)
        return [replace(micros[0], bad=bad, seen=seen), *micros[1:]]

    def _split(self, rows: list[Row]) -> list[list[Row]]:
        """Return the rows by variant, and within the limit of tokens."""
        groups = []
        for variant in dict.fromkeys(row.variant for row in rows):
            alike = [row for row in rows if row.variant == variant]
            if self.max_tokens is None:
                groups.append(alike)
                continue
            lengths = [len(row.input_ids) for row in alike]
            for places in split_by_tokens(lengths, self.max_tokens):
                groups.append([alike[place] for place in places])  # noqa: PERF401
        return groups


def split_by_tokens(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Split rows into micro batches of at most ``max_tokens`` each, padding counted.

    A micro batch counts as its longest row times its number of rows. Rows are taken from the
    longest to the shortest, and a micro batch ends at the first row that would exceed the limit:
    rows of similar length share one, so padding is small. A longer row is a micro batch by itself.

    Args:
        lengths: tokens of each row.
        max_tokens: the limit.

    Returns:
        the row numbers of each micro batch, ascending.
    """
    batches: list[list[int]] = []
    longest = 0  # of the last micro batch: its first row, since lengths descend
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or longest * (len(batches[-1]) + 1) > max_tokens:
            batches.append([])
            longest = lengths[number]
        batches[-1].append(number)
    return [sorted(batch) for batch in batches]


def build_loader(
    dataset: SampleDataset, batches: Any, collate: Collate, num_workers: int
) -> DataLoader:
    """Build a DataLoader that draws no random number and gives the same for any ``num_workers``.

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
        worker_init_fn=_leave_signals,
        generator=torch.Generator(),  # otherwise the loader draws a seed from the global one
    )


def end_workers(batches: Iterator[Any]) -> None:
    """End the processes of a loader's iterator, also of one that an exception's frames still hold.

    PyTorch does so when the iterator is freed, and has no public function for it.
    """
    end = getattr(batches, "_shutdown_workers", None)
    if end is not None:
        end()


def _leave_signals(worker: int) -> None:
    """Leave Ctrl-C and a first SIGTERM to the main process, which finishes its step.

    Terminals and schedulers signal every process of a run. After a SIGTERM the worker lives for
    ``GRACE`` seconds at most, and a second one ends it.
    """

    def leave_one(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.alarm(GRACE)  # SIGALRM ends a process

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, leave_one)
