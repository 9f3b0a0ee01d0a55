"""Rows are drawn by seed and id: of each kind its share, whatever their order in the file."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from avllm.data.schema import Sample
from avllm.errors import UserError
from avllm.evaluation.sampling import draw_rows


def rows(counts: dict[str | None, int]) -> list[Sample]:
    made = []
    for kind, count in counts.items():
        for number in range(count):
            fields = {
                "id": f"{kind}-{number}",
                "kind": kind,
                "messages": [{"role": "user", "content": "?"}],
            }
            made.append(Sample.model_validate(fields))
    return made


def test_each_kind_has_its_share() -> None:
    """At even distances, 100 of these rows would all be of one kind: the kinds alternate."""
    in_turn = [
        row for three in zip(*(rows({kind: 100}) for kind in "abc"), strict=True) for row in three
    ]
    drawn = draw_rows(in_turn, 100, 0)
    assert sorted(Counter(row.kind for row in drawn).values()) == [33, 33, 34]
    drawn = draw_rows(rows({"many": 900, None: 90, "few": 10}), 100, 0)
    assert Counter(row.kind for row in drawn) == {"many": 90, None: 9, "few": 1}


def test_the_seed_and_not_the_order_decides() -> None:
    all_rows = rows({"a": 50, "b": 30, None: 20})
    shuffled = random.Random(0).sample(all_rows, len(all_rows))
    assert draw_rows(all_rows, 20, 3) == draw_rows(shuffled, 20, 3)
    assert draw_rows(all_rows, 20, 3) != draw_rows(all_rows, 20, 4)
    assert draw_rows(all_rows, None, 3) == draw_rows(shuffled, 100, 5)


def test_a_smaller_limit_takes_a_part_of_a_larger_one() -> None:
    all_rows = rows({"a": 50, "b": 31})
    few = {row.id for row in draw_rows(all_rows, 10, 0)}
    assert len(few) == 10
    assert few < {row.id for row in draw_rows(all_rows, 40, 0)}


def test_a_limit_is_a_number_of_rows() -> None:
    with pytest.raises(UserError):
        draw_rows(rows({"a": 3}), 0, 0)
