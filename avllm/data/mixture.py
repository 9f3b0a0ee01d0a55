"""Which items come when: an endless sequence that is a function of (seed, place) alone, whatever the weights.

Each source is an endless chain of its own permutations. An epoch of the mixture takes each source's share of items
from its chain, going on where the epoch before stopped, and shuffles them together: a share as large as the source is
every item once an epoch, one twice as large twice, one half as large every second epoch. Where the weights change
(a curriculum) a new run of epochs begins with what the one that it broke off still held, and the chains go on.
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
    """Items that an epoch takes of each source.

    ``weight * size``, where a size counts up to its cap, and where a temperature above 1 brings the sizes closer
    together: they become proportional to ``size ** (1 / temperature)`` and keep their sum (examples-proportional mixing
    with a limit and a temperature; T5, arXiv 1910.10683, section 3.5.2). At least 1 of each source with a weight.

    Args:
        sizes: items of each source. weights: at least 0. caps: most items of each that count; None for all.
        temperature: above 0; 1 changes nothing, infinity makes all sources equal.

    Raises:
        ValueError: no source with items has a weight.
    """
    counted: list[float] = [min(n, cap or n) for n, cap in zip(sizes, caps or [None] * len(sizes), strict=True)]
    if temperature != 1.0:
        roots = [n ** (1 / temperature) if n else 0.0 for n in counted]
        counted = [sum(counted) * root / sum(roots) for root in roots]
    found = [max(1, round(w * n)) if w and n else 0 for w, n in zip(weights, counted, strict=True)]
    if not any(found):
        raise ValueError(f"sources of {list(sizes)} items with weights {list(weights)}: nothing to draw from")
    return found


@dataclass(frozen=True)
class Phase:
    """A stretch of the sequence with the same shares.

    Attributes:
        first: place where it begins. shares: items of each source in one of its epochs.
        drawn: items of each source that came before it.
        left: of each source, what the epoch that it broke off still held; it comes first.
        taken: of each source, how far into its chain the epochs before reached.
    """

    first: int
    shares: list[int]
    drawn: list[int]
    left: list[np.ndarray]
    taken: list[int]

    @property
    def length(self) -> int:
        """Items in an epoch."""
        return sum(self.shares)


class Order:
    """The endless, seeded sequence of item numbers of a mixture.

    Args:
        sizes: items of each source, numbered one after the other.
        weights: of each source, from the beginning.
        seed: of the run.
        caps, temperature: see :func:`shares`.
        changes: (place, weights) from where on others hold; places ascend and are multiples of ``block``.
        block: so many items in a row, counted from place 0, are of one source: a micro batch of one task. Shares are
            rounded up to multiples of it: a source smaller than a block comes more often (see :func:`portions`).
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
        self.sizes, self.seed, self.block = list(sizes), seed, block
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)[:-1]]).astype(np.int64)
        self._epochs: dict[tuple[int, int], np.ndarray] = {}
        self.phases: list[Phase] = []
        for first, phase_weights in [(0, weights), *changes]:
            if first % block or (self.phases and first <= self.phases[-1].first):
                raise ValueError(f"weights change at place {first}; expected ascending multiples of {block}")
            found = shares(self.sizes, phase_weights, caps, temperature)
            self.phases.append(Phase(first, [-(-n // block) * block for n in found], *self._before(first)))

    @property
    def epoch_length(self) -> int:
        """Items in an epoch of the mixture, as it is in the beginning."""
        return self.phases[0].length

    def items(self, first: int, count: int) -> list[int]:
        """``count`` items from place ``first`` of the endless sequence."""
        out: list[int] = []
        while count > 0:
            number = self._phase_at(first)
            phase = self.phases[number]
            epoch, place = divmod(first - phase.first, phase.length)
            left = self.phases[number + 1].first - first if number + 1 < len(self.phases) else count
            part = self.epoch(epoch, number)[place : place + min(count, left)]
            out += part.tolist()
            first, count = first + len(part), count - len(part)
        return out

    def drawn(self, count: int) -> list[int]:
        """Items of each source among the first ``count``."""
        number = self._phase_at(max(0, count - 1))
        phase = self.phases[number]
        epochs, rest = divmod(count - phase.first, phase.length)
        items = self.epoch(epochs, number)[:rest] if rest else np.empty(0, np.int64)
        last = np.bincount(np.searchsorted(self.starts, items, side="right") - 1, minlength=len(self.sizes))
        return [d + epochs * s + int(n) for d, s, n in zip(phase.drawn, phase.shares, last, strict=True)]

    def drawn_items(self, count: int) -> np.ndarray:
        """``(items,)`` bool: which are among the first ``count``; whole epochs are not gone through."""
        seen = np.zeros(sum(self.sizes), bool)
        ends = [*(phase.first for phase in self.phases[1:]), count]
        for number, (phase, end) in enumerate(zip(self.phases, ends, strict=True)):
            if phase.first >= count:
                break
            epochs, rest = divmod(min(end, count) - phase.first, phase.length)
            for source, size in enumerate(self.sizes):
                most = (
                    len(phase.left[source]) + 2 * size
                )  # a stretch of a chain as long as two copies holds a whole one
                seen[self._stretch(source, phase, 0, min(epochs * phase.shares[source], most))] = True
            if rest:
                seen[self.epoch(epochs, number)[:rest]] = True
        return seen

    def _before(self, first: int) -> tuple[list[int], list[np.ndarray], list[int]]:
        """What a phase that begins at a place finds: see :class:`Phase`."""
        if not self.phases:
            return [0] * len(self.sizes), [np.empty(0, np.int64)] * len(self.sizes), [0] * len(self.sizes)
        phase = self.phases[-1]
        epochs, rest = divmod(first - phase.first, phase.length)
        broken = self.epoch(epochs, len(self.phases) - 1)[rest:] if rest else np.empty(0, np.int64)
        left, taken = [], []
        for source, (start, size) in enumerate(zip(self.starts, self.sizes, strict=True)):
            used = (epochs + bool(rest)) * phase.shares[source]
            own = broken[(broken >= start) & (broken < start + size)]
            left.append(np.concatenate([own, phase.left[source][used:]]))
            taken.append(phase.taken[source] + max(0, used - len(phase.left[source])))
        return self.drawn(first), left, taken

    def _phase_at(self, place: int) -> int:
        return bisect.bisect_right(self.phases, place, key=lambda phase: phase.first) - 1

    def epoch(self, number: int, phase: int = 0) -> np.ndarray:
        """``(length,)`` item numbers of an epoch, counted from the beginning of its phase."""
        key = (phase, number)
        if key not in self._epochs:
            parts = [self._share(source, number, self.phases[phase]) for source in range(len(self.sizes))]
            blocks = np.concatenate(parts).reshape(-1, self.block)
            rng = np.random.default_rng([self.seed, 1, number, *([phase] if phase else [])])
            mixed = rng.permutation(blocks).reshape(-1)
            self._epochs = {k: v for k, v in self._epochs.items() if k >= (phase, number - 1)} | {key: mixed}
        return self._epochs[key]

    def _share(self, source: int, epoch: int, phase: Phase) -> np.ndarray:
        return self._stretch(source, phase, epoch * phase.shares[source], phase.shares[source])

    def _stretch(self, source: int, phase: Phase, first: int, count: int) -> np.ndarray:
        """``count`` items of a source in a phase, from its ``first``: what was left, then those of its chain."""
        if count == 0:
            return np.empty(0, np.int64)
        size, left = self.sizes[source], phase.left[source]
        kept = left[first : first + count]
        begin = phase.taken[source] + max(0, first - len(left))
        copies = range(begin // size, (begin + count - 1) // size + 1)
        chain = np.concatenate([self._permutation(source, copy) for copy in copies])
        skip = begin - copies.start * size
        return np.concatenate([kept, self.starts[source] + chain[skip : skip + count - len(kept)]])

    def _permutation(self, source: int, copy: int) -> np.ndarray:
        return np.random.default_rng([self.seed, 2, source, copy]).permutation(self.sizes[source])


def order_of(config: RunConfig, items: Items, processes: int) -> Order:
    """The order of a run's training items.

    Args:
        config: of the run. items: of its training manifests. processes: that train together.

    Raises:
        ValueError: there is nothing to draw from.
    """
    data, train = config.data, config.train
    step_items = train.batch_size * train.accumulate * processes
    steps = sorted({step for source in data.train for step in source.steps} - {0})
    caps = [
        None if s.max_rows is None else max(1, round(s.max_rows * size / max(1, rows)))  # rows of a pack come together
        for s, size, rows in zip(data.train, items.sizes, items.row_counts, strict=True)
    ]
    return Order(
        items.sizes,
        [s.weight_at(0) for s in data.train],
        config.seed,
        caps=caps,
        temperature=data.temperature,
        changes=[(step * step_items, [s.weight_at(step) for s in data.train]) for step in steps],
        block=train.batch_size if data.batches == "one_source" else 1,
    )


def steps_of(config: RunConfig, order: Order, processes: int) -> int:
    """Optimizer steps of a run."""
    train = config.train
    if train.max_steps:
        return train.max_steps
    return math.ceil((train.epochs or 0) * order.epoch_length / (train.batch_size * train.accumulate * processes))


@dataclass(frozen=True)
class Portion:
    """What a run draws of one source.

    Attributes:
        weight, max_rows: as the settings have them.
        rows, items: in the source (fewer items where rows are packed), less those in quarantine.
        drawn: items drawn in the whole run. share: of all items drawn. epochs: how often each item is seen.
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
    """The mixture of a run as it comes out: effective epochs of each source over all its steps."""
    order = order_of(config, items, processes)
    count = steps_of(config, order, processes) * config.train.batch_size * config.train.accumulate * processes
    return [
        Portion(
            manifest=manifest.name,
            weight=source.weight,
            max_rows=source.max_rows,
            rows=rows,
            items=size,
            drawn=drawn,
            share=drawn / max(1, count),
            epochs=drawn / max(1, size),
        )
        for manifest, source, rows, size, drawn in zip(
            items.manifests, config.data.train, items.row_counts, items.sizes, order.drawn(count), strict=True
        )
    ]
