"""The order of the data: a function of the seed and the place, whatever cuts it."""

from __future__ import annotations

from collections import Counter
from functools import partial

import numpy as np
import torch

from avllm.data.collate import collate
from avllm.data.dataset import Loaded
from avllm.data.items import Bad
from avllm.data.loader import Collate, Cut, MicroBatches, OncePerItem, split_by_tokens
from avllm.data.mixture import Order
from avllm.data.packing import fill_sequences
from avllm.data.row import Row


def test_an_epoch_holds_each_item_as_often_as_its_weight_says() -> None:
    order = Order([10, 4, 6], [1.0, 2.0, 0.5], seed=3)
    assert order.epoch_length == 10 + 8 + 3
    counts = Counter(order.items(0, 21))
    assert all(counts[i] == 1 for i in range(10))
    assert all(counts[i] == 2 for i in range(10, 14))
    assert sum(counts[i] for i in range(14, 20)) == 3
    two = Counter(order.items(0, 42))
    assert all(two[i] == 1 for i in range(14, 20)), "two half epochs of a source are all of it"


def test_order_is_seeded_and_changes_with_the_epoch() -> None:
    order = Order([50], [1.0], seed=1)
    assert order.items(0, 50) == Order([50], [1.0], seed=1).items(0, 50)
    assert order.items(0, 50) != order.items(50, 50)
    assert order.items(0, 50) != Order([50], [1.0], seed=2).items(0, 50)
    assert sorted(order.items(50, 50)) == list(range(50))
    assert order.items(37, 30) == order.items(0, 67)[37:]


def test_processes_and_accumulation_see_the_same_rows_at_each_step() -> None:
    order = Order([30], [1.0], seed=0)
    one = list(MicroBatches(order, Cut(2, accumulate=4), 0, 5))
    ranks = [
        list(MicroBatches(order, Cut(2, accumulate=2, world_size=2, rank=r), 0, 5))
        for r in range(2)
    ]
    whole = list(MicroBatches(order, Cut(8), 0, 5))
    for step in range(5):
        rows = sorted(i for b in one[4 * step : 4 * step + 4] for i in b)
        assert (
            rows
            == sorted(i for r in ranks for b in r[2 * step : 2 * step + 2] for i in b)
            == sorted(whole[step])
        )


def test_resuming_is_skipping() -> None:
    order, cut = Order([7, 5], [1.0, 1.5], seed=0), Cut(3, accumulate=2)
    assert list(MicroBatches(order, cut, 4, 9)) == list(MicroBatches(order, cut, 0, 9))[8:]
    assert len(MicroBatches(order, cut, 4, 9)) == 10


def test_validation_sees_everything_once_on_ranks_of_equal_length() -> None:
    ranks = [list(OncePerItem(range(11), Cut(2, world_size=2, rank=r))) for r in range(2)]
    assert sorted(i for r in ranks for b in r for i in b) == list(range(11))
    assert len(ranks[0]) == len(ranks[1])


def test_batches_within_a_budget_hold_everything_once_and_waste_little() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 600, 200).tolist()
    batches = split_by_tokens(lengths, 4096)
    assert sorted(i for batch in batches for i in batch) == list(range(200))
    padded = [len(batch) * max(lengths[i] for i in batch) for batch in batches]
    assert max(padded) <= 4096
    assert 1 - sum(lengths) / sum(padded) < 0.08
    assert all(batch == sorted(batch) for batch in batches)
    assert split_by_tokens([5, 5, 9], 10) == [[2], [0, 1]]
    assert split_by_tokens([12, 3], 10) == [[0], [1]], "one that is too long stands alone"


def row_of(length: int) -> Row:
    ids = torch.arange(length)
    return Row(f"r{length}", ids, ids, [], torch.zeros(length, dtype=torch.bool))


def test_a_limit_in_tokens_cuts_a_micro_batch_and_loses_nothing() -> None:
    empty = row_of(2)
    loaded = [Loaded([row_of(n)], [], 1) for n in (9, 3, 4, 8)]
    loaded.append(Loaded([], [Bad("x", "s", "m", "missing", "")], 1))
    (whole,) = Collate(partial(collate, pad_id=0), empty)(loaded)
    parts = Collate(partial(collate, pad_id=0), empty, max_tokens=18)(loaded)
    assert [m.batch.ids for m in parts] == [["r9", "r8"], ["r3", "r4"]]
    assert [m.batch.input_ids.numel() for m in parts] == [18, 8]
    assert sum(m.batch.num_targets for m in parts) == whole.batch.num_targets
    assert (
        (sum(m.seen for m in parts), sum(m.tokens for m in parts))
        == (whole.seen, whole.tokens)
        == (5, 24)
    )
    assert [b for m in parts for b in m.bad] == whole.bad != []
    filled = Collate(partial(collate, pad_id=0), empty, partial(fill_sequences, max_length=12), 24)(
        loaded
    )
    assert [m.batch.input_ids.shape for m in filled] == [(2, 12)]
    for limit in (None, 18):
        (nothing,) = Collate(partial(collate, pad_id=0), empty, max_tokens=limit)([])
        assert (nothing.batch.ids, nothing.seen, nothing.tokens, nothing.bad) == (["r2"], 0, 0, [])
