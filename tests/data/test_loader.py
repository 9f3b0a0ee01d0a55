"""The order of the data: a function of the seed and the place, whatever cuts it."""

from __future__ import annotations

from collections import Counter

from avllm.data.loader import Cut, MicroBatches, OncePerItem, Order


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
    ranks = [list(MicroBatches(order, Cut(2, accumulate=2, world_size=2, rank=r), 0, 5)) for r in range(2)]
    whole = list(MicroBatches(order, Cut(8), 0, 5))
    for step in range(5):
        rows = sorted(i for b in one[4 * step : 4 * step + 4] for i in b)
        assert rows == sorted(i for r in ranks for b in r[2 * step : 2 * step + 2] for i in b) == sorted(whole[step])


def test_resuming_is_skipping() -> None:
    order, cut = Order([7, 5], [1.0, 1.5], seed=0), Cut(3, accumulate=2)
    assert list(MicroBatches(order, cut, 4, 9)) == list(MicroBatches(order, cut, 0, 9))[8:]
    assert len(MicroBatches(order, cut, 4, 9)) == 10


def test_validation_sees_everything_once_on_ranks_of_equal_length() -> None:
    ranks = [list(OncePerItem(11, Cut(2, world_size=2, rank=r))) for r in range(2)]
    assert sorted(i for r in ranks for b in r for i in b) == list(range(11))
    assert len(ranks[0]) == len(ranks[1])
