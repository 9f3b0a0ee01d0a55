"""Order the items of a mixture: an endless sequence that depends on (seed, place) alone.

Each source is an endless chain of permutations of its items. An epoch of the mixture takes each
source's share of items from its chain, from where the epoch before stopped, and shuffles them
together: a share as large as the source gives every item once an epoch, one twice as large twice,
one half as large every second epoch. Where the weights change (a curriculum), a new phase begins
with the items that were left in the last epoch of the phase before, and the chains continue.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from avllm.config import RunConfig
    from avllm.data.items import Items


def shares(
    sizes: Sequence[int],
    weights: Sequence[float],
    caps: Sequence[int | None] | None = None,
    temperature: float = 1.0,
) -> list[int]:
    """Return the number of items that an epoch takes of each source.

    It is ``weight * size``, where a size counts up to its cap, and where a temperature above 1
    brings the sizes closer together: they become proportional to ``size ** (1 / temperature)`` with
    the same sum (examples-proportional mixing with a limit and a temperature; T5, arXiv 1910.10683,
    section 3.5.2). A source with items and a weight gives at least 1.

    Args:
        sizes: items of each source.
        weights: of each source, at least 0.
        caps: most items of each source that count; None for all.
        temperature: above 0; 1 changes nothing, infinity makes all sources equal.

    Raises:
        ValueError: no source with items has a weight.
    """
    caps = caps or [None] * len(sizes)
    capped: list[float] = [min(size, cap or size) for size, cap in zip(sizes, caps, strict=True)]
    if temperature != 1.0:
        roots = [size ** (1 / temperature) if size else 0.0 for size in capped]
        capped = [sum(capped) * root / sum(roots) for root in roots]
    items: list[int] = []
    for weight, size in zip(weights, capped, strict=True):
        items.append(max(1, round(weight * size)) if weight and size else 0)
    if not any(items):
        seen = f"sources of {list(sizes)} items with weights {list(weights)}"
        raise ValueError(f"{seen}: nothing to draw from; expected a weight above 0 for a source")
    return items


@dataclass(frozen=True)
class Phase:
    """Hold a part of the sequence with the same shares.

    Attributes:
        first: place where it begins.
        shares: items of each source in one of its epochs.
        drawn: number of items of each source before it.
        left: items of each source that the last epoch before it did not give; they come first.
        taken: how many items of each source's chain the phases before took.
    """

    first: int
    shares: list[int]
    drawn: list[int]
    left: list[np.ndarray]
    taken: list[int]

    @property
    def length(self) -> int:
        """Return the number of items in an epoch."""
        return sum(self.shares)


class Order:
    """Give the endless, seeded sequence of item numbers of a mixture.

    Args:
        sizes: items of each source, numbered one after the other.
        weights: of each source, from the beginning.
        seed: of the run.
        caps: see :func:`shares`.
        temperature: see :func:`shares`.
        changes: (place, weights) from which on other weights apply; places ascend and are multiples
            of ``block``.
        block: so many items in a row, counted from place 0, are of one source: a micro batch of one
            task. Shares are rounded up to multiples of it, so that a source smaller than a block
            comes more often (see :func:`portions`).
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        seed: int,
        *,
        caps: Sequence[int | None] | None = None,
        temperature: float = 1.0,
        changes: Sequence[tuple[int, Sequence[float]]] = (),
        block: int = 1,
    ) -> None:
        self.sizes = list(sizes)
        self.seed = seed
        self.block = block
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)[:-1]]).astype(np.int64)
        self._epochs: dict[tuple[int, int], np.ndarray] = {}
        self.phases: list[Phase] = []
        for first, phase_weights in [(0, weights), *changes]:
            if first % block or (self.phases and first <= self.phases[-1].first):
                seen = f"weights change at place {first}"
                raise ValueError(f"{seen}; expected ascending multiples of {block}")
            items = shares(self.sizes, phase_weights, caps, temperature)
            in_blocks = [math.ceil(count / block) * block for count in items]
            self.phases.append(self._phase(first, in_blocks))

    @property
    def epoch_length(self) -> int:
        """Return the number of items in an epoch of the first phase."""
        return self.phases[0].length

    def items(self, first: int, count: int) -> list[int]:
        """Return ``count`` items from place ``first`` of the endless sequence."""
        numbers: list[int] = []
        while count > 0:
            number = self._phase_at(first)
            phase = self.phases[number]
            epoch, place = divmod(first - phase.first, phase.length)
            most = count
            if number + 1 < len(self.phases):
                most = min(count, self.phases[number + 1].first - first)
            part = self.epoch(epoch, number)[place : place + most]
            numbers += part.tolist()
            first += len(part)
            count -= len(part)
        return numbers

    def drawn(self, count: int) -> list[int]:
        """Return the number of items of each source among the first ``count``."""
        number = self._phase_at(max(0, count - 1))
        phase = self.phases[number]
        epochs, rest = divmod(count - phase.first, phase.length)
        items = self.epoch(epochs, number)[:rest] if rest else np.empty(0, np.int64)
        sources = np.searchsorted(self.starts, items, side="right") - 1  # (rest,)
        in_rest = np.bincount(sources, minlength=len(self.sizes)).tolist()
        totals: list[int] = []
        for source, before in enumerate(phase.drawn):
            totals.append(before + epochs * phase.shares[source] + in_rest[source])
        return totals

    def drawn_items(self, count: int) -> np.ndarray:
        """Return ``(items,)`` bool: the first ``count`` items, without making whole epochs."""
        seen = np.zeros(sum(self.sizes), bool)
        ends = [*(phase.first for phase in self.phases[1:]), count]
        for number, (phase, end) in enumerate(zip(self.phases, ends, strict=True)):
            if phase.first >= count:
                break
            epochs, rest = divmod(min(end, count) - phase.first, phase.length)
            for source, size in enumerate(self.sizes):
                # Two permutations' length of a chain holds a whole one, wherever it begins.
                most = len(phase.left[source]) + 2 * size
                drawn = min(epochs * phase.shares[source], most)
                seen[self._stretch(source, phase, 0, drawn)] = True
            if rest:
                seen[self.epoch(epochs, number)[:rest]] = True
        return seen

    def _phase(self, first: int, phase_shares: list[int]) -> Phase:
        """Return the phase that begins at a place, given the phases before."""
        none = np.empty(0, np.int64)
        if not self.phases:
            zeros = [0] * len(self.sizes)
            return Phase(first, phase_shares, zeros, [none] * len(self.sizes), zeros)
        before = self.phases[-1]
        epochs, rest = divmod(first - before.first, before.length)
        remaining = none  # of the epoch that this phase ends early
        if rest:
            remaining = self.epoch(epochs, len(self.phases) - 1)[rest:]
            epochs += 1
        left: list[np.ndarray] = []
        taken: list[int] = []
        for source, (start, size) in enumerate(zip(self.starts, self.sizes, strict=True)):
            used = epochs * before.shares[source]  # first the items left before, then the chain's
            own = remaining[(remaining >= start) & (remaining < start + size)]
            left.append(np.concatenate([own, before.left[source][used:]]))
            taken.append(before.taken[source] + max(0, used - len(before.left[source])))
        return Phase(first, phase_shares, self.drawn(first), left, taken)

    def _phase_at(self, place: int) -> int:
        """Return the number of the phase at a place."""
        return bisect.bisect_right(self.phases, place, key=lambda phase: phase.first) - 1

    def epoch(self, number: int, phase: int = 0) -> np.ndarray:
        """Return ``(length,)`` item numbers of an epoch, counted from the begin of its phase."""
        key = (phase, number)
        if key not in self._epochs:
            items: list[np.ndarray] = []
            for source, share in enumerate(self.phases[phase].shares):
                items.append(self._stretch(source, self.phases[phase], number * share, share))
            blocks = np.concatenate(items).reshape(-1, self.block)
            seeds = [self.seed, 1, number]
            if phase:
                seeds.append(phase)
            mixed = np.random.default_rng(seeds).permutation(blocks).reshape(-1)
            # Earlier epochs are dropped: at most the one before is asked for again.
            recent = {k: v for k, v in self._epochs.items() if k >= (phase, number - 1)}
            self._epochs = {**recent, key: mixed}
        return self._epochs[key]

    def _stretch(self, source: int, phase: Phase, first: int, count: int) -> np.ndarray:
        """Return ``count`` items of a source from the ``first`` in a phase.

        The items left from the phase before come first, then those of the source's chain.
        """
        if count == 0:
            return np.empty(0, np.int64)
        size = self.sizes[source]
        left = phase.left[source]
        from_left = left[first : first + count]
        begin = phase.taken[source] + max(0, first - len(left))  # place in the endless chain
        copies = range(begin // size, (begin + count - 1) // size + 1)
        chain = np.concatenate([self._permutation(source, copy) for copy in copies])
        skip = begin - copies.start * size
        from_chain = chain[skip : skip + count - len(from_left)]
        return np.concatenate([from_left, self.starts[source] + from_chain])

    def _permutation(self, source: int, copy: int) -> np.ndarray:
        """Return the permutation of a source's items at a position of its chain."""
        return np.random.default_rng([self.seed, 2, source, copy]).permutation(self.sizes[source])


def order_of(config: RunConfig, items: Items, processes: int) -> Order:
    """Return the order of a run's training items.

    Args:
        config: of the run.
        items: of its training manifests.
        processes: that train together.

    Raises:
        ValueError: there is nothing to draw from.
    """
    data = config.data
    train = config.train
    step_items = train.batch_size * train.accumulate * processes
    steps: set[int] = set()
    for source in data.train:
        steps.update(source.steps)
    changes: list[tuple[int, list[float]]] = []
    for step in sorted(steps - {0}):
        weights = [source.weight_at(step) for source in data.train]
        changes.append((step * step_items, weights))
    caps: list[int | None] = []
    for source, size, rows in zip(data.train, items.sizes, items.row_counts, strict=True):
        if source.max_rows is None:
            caps.append(None)
        else:  # items of several rows count as so many
            caps.append(max(1, round(source.max_rows * size / max(1, rows))))
    return Order(
        items.sizes,
        [source.weight_at(0) for source in data.train],
        config.seed,
        caps=caps,
        temperature=data.temperature,
        changes=changes,
        block=train.batch_size if data.batches == "one_source" else 1,
    )


def steps_of(config: RunConfig, order: Order, processes: int) -> int:
    """Return the number of optimizer steps of a run."""
    train = config.train
    if train.max_steps:
        return train.max_steps
    step_items = train.batch_size * train.accumulate * processes
    return math.ceil((train.epochs or 0) * order.epoch_length / step_items)


@dataclass(frozen=True)
class Portion:
    """Report what a run draws of one source.

    Attributes:
        manifest: of the source.
        weight: of the settings.
        max_rows: of the settings.
        rows: in the source, without those in quarantine.
        items: of these rows; fewer where rows are packed.
        drawn: items drawn in the whole run.
        share: of all items drawn.
        epochs: how often each item is seen.
    """

    manifest: str
    weight: float | dict[int, float]
    max_rows: int | None
    rows: int
    items: int
    drawn: int
    share: float
    epochs: float


def portions(config: RunConfig, items: Items, processes: int = 1) -> list[Portion]:
    """Return what a run draws of each source over all its steps."""
    order = order_of(config, items, processes)
    train = config.train
    step_items = train.batch_size * train.accumulate * processes
    count = steps_of(config, order, processes) * step_items
    portions_by_source: list[Portion] = []
    for number, drawn in enumerate(order.drawn(count)):
        source = config.data.train[number]
        portions_by_source.append(
            Portion(
                manifest=items.manifests[number].name,
                weight=source.weight,
                max_rows=source.max_rows,
                rows=items.row_counts[number],
                items=items.sizes[number],
                drawn=drawn,
                share=drawn / max(1, count),
                epochs=drawn / max(1, items.sizes[number]),
            )
        )
    return portions_by_source
