"""Soft targets: their loss by hand, and the same targets in a row, a batch and packed rows."""

from __future__ import annotations

import math

import pytest
import torch

from avllm.data.collate import collate
from avllm.data.packing import fill_sequences, share_media
from avllm.data.row import IGNORE, Row
from avllm.data.soft import Soft
from avllm.objectives.next_token import SoftTargets, next_token_loss, soft_targets, targets


def row(ids: list[int], trained: list[int], soft: dict[int, dict[int, float]]) -> Row:
    labels = [token if place in trained else IGNORE for place, token in enumerate(ids)]
    media = torch.zeros(len(ids), dtype=torch.bool)
    return Row(
        "r", torch.tensor(ids), torch.tensor(labels), [], media, soft=Soft.of(list(soft.items()))
    )


def loss_of(rows: list[Row], side: str = "right", vocabulary: int = 12) -> float:
    """The loss with logits that follow from a token alone, so that packing changes none of them."""
    batch = collate(rows, pad_id=0, padding_side=side)
    table = torch.randn(
        vocabulary, vocabulary, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    at, wanted = targets(batch.labels)
    loss, _ = next_token_loss(
        table[batch.input_ids][at], wanted, soft_targets(batch.labels, batch.soft)
    )
    return float(loss)


def test_loss_by_hand() -> None:
    logits = torch.tensor(
        [[0.0, math.log(2.0), 0.0], [0.0, 0.0, 0.0]]
    )  # 1/4, 1/2, 1/4; a third each
    soft = SoftTargets(torch.tensor([0, 0]), torch.tensor([1, 2]), torch.tensor([0.75, 0.25]))
    loss, hits = next_token_loss(logits, torch.tensor([1, 2]), soft)
    expected = 0.75 * math.log(2) + 0.25 * math.log(4) + math.log(3)
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    assert int(hits.sum()) == 1


def test_one_hot_is_a_hard_label() -> None:
    torch.manual_seed(0)
    logits, wanted = torch.randn(5, 7), torch.randint(7, (5,))
    every = SoftTargets(torch.arange(5), wanted, torch.ones(5))
    hard, soft = next_token_loss(logits, wanted)[0], next_token_loss(logits, wanted, every)[0]
    assert float(hard) == pytest.approx(float(soft), rel=1e-6)


ROWS = [
    row([1, 2, 3, 4, 5], [3, 4], {3: {4: 0.6, 9: 0.4}}),
    row([1, 2, 6, 7], [2, 3], {2: {6: 0.9, 8: 0.1}, 3: {7: 0.5, 10: 0.5}}),
    row([1, 2, 3, 8, 2, 9], [4, 5], {5: {9: 0.7, 1: 0.3}}),
    row([1, 2, 5, 3], [2, 3], {}),
]


def test_a_batch_is_its_rows_one_by_one() -> None:
    alone = sum(loss_of([one]) for one in ROWS)
    assert loss_of(ROWS) == pytest.approx(alone, rel=1e-6)
    assert loss_of(ROWS, side="left") == pytest.approx(alone, rel=1e-6)
    hard = [
        row(one.input_ids.tolist(), one.labels.ge(0).nonzero().flatten().tolist(), {})
        for one in ROWS
    ]
    assert abs(loss_of(hard) - alone) > 1e-2, "the distributions count"


def test_packed_is_unpacked() -> None:
    alone = sum(loss_of([one]) for one in ROWS)
    packed = share_media(ROWS, 100)
    assert len(packed) == 1
    assert loss_of(packed) == pytest.approx(alone, rel=1e-6)
    filled = fill_sequences(ROWS, 11)
    assert len(filled) == 2
    assert loss_of(filled) == pytest.approx(alone, rel=1e-6)
    assert loss_of(fill_sequences([packed[0], *ROWS], 100)) == pytest.approx(2 * alone, rel=1e-6)


def test_a_place_that_is_not_trained_on_counts_for_nothing() -> None:
    first = row([1, 2, 3], [0, 2], {0: {1: 0.5, 4: 0.5}, 1: {2: 0.5, 5: 0.5}})
    assert loss_of([first]) == pytest.approx(loss_of([row([1, 2, 3], [2], {})]), rel=1e-6)


def test_rows_share_no_place_whose_distribution_may_differ() -> None:
    one = row([1, 2, 3, 4, 5], [4], {2: {3: 0.6, 9: 0.4}})
    two = row([1, 2, 3, 4, 6], [4], {2: {3: 0.8, 9: 0.2}})
    (packed,) = share_media([one, two], 100)
    assert packed.soft is not None
    assert packed.soft.place.tolist() == [2, 2, 5, 5]
    assert packed.input_ids.tolist() == [1, 2, 3, 4, 5, 3, 4, 6]


def test_it_moves_with_its_batch() -> None:
    batch = collate(ROWS, pad_id=0)
    assert batch.soft is not None
    moved = batch.to("meta").soft
    assert moved is not None
    assert {value.device.type for value in (moved.row, moved.place, moved.id, moved.weight)} == {
        "meta"
    }
    assert collate(ROWS[3:], pad_id=0).soft is None
