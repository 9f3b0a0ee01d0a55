"""Mixtures: what an epoch takes of each source, how weights change, and batches of one source."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from avllm.config import RunConfig, load_config
from avllm.config_errors import ConfigError
from avllm.data.items import Items
from avllm.data.loader import Cut, MicroBatches
from avllm.data.manifest import write_manifest
from avllm.data.mixture import Order, order_of, portions, shares, steps_of

PRESET = (
    Path(__file__).resolve().parents[2] / "train" / "presets" / "qwen_av" / "stage3_instruct.yaml"
)


def by_source(order: Order, items: list[int]) -> list[int]:
    """How many items of each source."""
    counts = Counter((np.searchsorted(order.starts, items, side="right") - 1).tolist())
    return [counts[n] for n in range(len(order.sizes))]


def test_shares_by_weight_cap_and_temperature() -> None:
    assert shares([10, 4, 6], [1.0, 2.0, 0.5]) == [10, 8, 3]
    assert shares([1000, 10], [1.0, 1.0], caps=[100, 100]) == [100, 10]
    assert shares([1000, 10], [0.5, 1.0], caps=[100, None]) == [50, 10]
    assert shares([900, 100], [1.0, 1.0], temperature=2.0) == [750, 250], (
        "roots are as 30 to 10, and 1000 in all"
    )
    assert shares([900, 100], [1.0, 1.0], temperature=1e9) == [500, 500]
    assert shares([900, 100], [1.0, 1.0], caps=[300, 300], temperature=1.0) == [300, 100]
    assert shares([5, 0, 5], [0.0, 1.0, 0.01]) == [0, 0, 1]
    with pytest.raises(ValueError, match="nothing to draw from"):
        shares([5, 0], [0.0, 1.0])


def test_a_capped_source_is_seen_whole_over_several_epochs() -> None:
    order = Order([100, 10], [1.0, 1.0], seed=0, caps=[25, None])
    assert order.epoch_length == 35
    four = Counter(order.items(0, 140))
    assert all(four[i] == 1 for i in range(100))
    assert all(four[i] == 4 for i in range(100, 110))


def test_weights_change_at_their_place_and_chains_go_on() -> None:
    order = Order([40, 12], [1.0, 0.0], seed=3, changes=[(18, [0.5, 1.0]), (90, [0.0, 1.0])])
    plain = Order([40, 12], [1.0, 0.0], seed=3)
    assert order.items(0, 18) == plain.items(0, 18)
    assert by_source(order, order.items(0, 18)) == [18, 0]
    assert by_source(order, order.items(18, 32)) == [20, 12]
    assert set(order.items(90, 200)) == set(range(40, 52))
    assert (
        [order.items(p, 1)[0] for p in range(120)]
        == order.items(0, 120)
        == order.items(0, 7) + order.items(7, 113)
    )
    for count in (0, 1, 17, 18, 19, 50, 89, 90, 91, 150):
        assert order.drawn(count) == by_source(order, order.items(0, count))
    first = Counter(i for i in order.items(0, 18 + 2 * 32) if i < 40)
    assert sorted(first.values()) == [1] * 22 + [2] * 18, (
        "what the broken epoch still held comes first"
    )
    second = [i for i in order.items(0, 200) if i >= 40]
    assert all(Counter(second[12 * n : 12 * n + 12]) == Counter(range(40, 52)) for n in range(2))


@pytest.mark.parametrize(
    "changes", [[(5, [1.0, 1.0])], [(8, [1.0, 1.0]), (8, [1.0, 2.0])], [(0, [1.0, 1.0])]]
)
def test_places_of_change_ascend_in_whole_blocks(changes: Any) -> None:
    with pytest.raises(ValueError, match="weights change at place"):
        Order([10, 10], [1.0, 1.0], 0, changes=changes, block=4)


def test_each_micro_batch_is_of_one_source() -> None:
    order = Order([37, 11, 5], [1.0, 1.0, 2.0], seed=1, block=4, changes=[(48, [1.0, 0.0, 3.0])])
    batches = [[i for i, _ in b] for b in MicroBatches(order, Cut(4, 2), 0, 30)]
    found = [by_source(order, batch) for batch in batches]
    assert all(sorted(counts) == [0, 0, 4] for counts in found)
    assert {counts.index(4) for counts in found[:12]} == {0, 1, 2}
    assert {counts.index(4) for counts in found[12:]} == {0, 2}
    ranks = [list(MicroBatches(order, Cut(4, 1, 2, rank), 0, 30)) for rank in (0, 1)]
    assert [b for pair in zip(*ranks, strict=True) for b in pair] == list(
        MicroBatches(order, Cut(4, 2), 0, 30)
    )
    seen = Counter(order.items(0, 60))
    assert all(seen[i] for i in range(37)), "an epoch in whole blocks leaves nothing out"


def preset(folder: Path, *overrides: str) -> RunConfig:
    """The settings of a mixture of two manifests of 30 and 10 rows, each file asked about twice."""
    for name, count in (("a", 30), ("b", 10)):
        clip = {"type": "video", "video": "{}.mp4"}
        rows = [
            {
                "id": f"{name}{n}",
                "messages": [
                    {"role": "user", "content": [{**clip, "video": f"{n // 2}.mp4"}]},
                    {"role": "assistant", "content": "x"},
                ],
            }
            for n in range(count)
        ]
        write_manifest(folder / f"{name}.jsonl", rows)
    sources = f"data.train=[{{manifest: {folder}/a.jsonl}}, {{manifest: {folder}/b.jsonl}}]"
    plain = ["data.pack=false", "train.batch_size=2", "train.accumulate=2", "data.max_length=64"]
    return load_config(PRESET, [sources, *plain, *overrides])


def items_of(config: RunConfig) -> Items:
    return Items([s.manifest for s in config.data.train], pack=config.data.shares_media)


def test_portions_tell_what_a_run_draws(tmp_path: Path) -> None:
    config = preset(tmp_path, "train.epochs=2", "data.train.1.weight=3")
    a, b = portions(config, items_of(config))
    assert (a.rows, a.items, a.drawn, a.epochs) == (30, 30, 60, 2.0)
    assert (b.rows, b.items, b.drawn, b.share, b.epochs) == (10, 10, 60, 0.5, 6.0)
    packed = preset(tmp_path, "train.epochs=2", "data.pack=true", "data.train.0.max_rows=10")
    a, b = portions(packed, items_of(packed))
    assert (a.items, a.drawn, b.items, b.drawn) == (15, 10, 5, 10), (
        "a cap counts rows, and two make an item"
    )


def test_a_curriculum_begins_at_its_step_whatever_the_processes(tmp_path: Path) -> None:
    steps = [
        "train.epochs=null",
        "train.max_steps=6",
        "data.train.1.weight={0: 0, 3: 1}",
        "data.train.0.weight={0: 1, 3: 0}",
    ]
    config = preset(tmp_path, *steps)
    items = items_of(config)
    for processes in (1, 2):
        order = order_of(config, items, processes)
        assert steps_of(config, order, processes) == 6
        assert order.phases[1].first == 3 * 4 * processes
        assert order.drawn(6 * 4 * processes) == [12 * processes, 12 * processes]
    with pytest.raises(
        ConfigError, match="weights that change with the steps go with train.max_steps"
    ):
        preset(tmp_path, "data.train.1.weight={0: 0, 3: 1}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train.0.weight=0", "data.train.0.weight.number: Input should be greater than 0"),
        (
            "data.train.0.weight={5: 1}",
            r"weights from steps \[5\]; expected the first at step 0",
        ),
        ("data.train.0.max_rows=0", "data.train.0.max_rows: "),
        ("data.temperature=0", "data.temperature: "),
        ("data.batches=homogeneous", "data.batches: Input should be 'mixed' or 'one_source'"),
        ("data.train.0.wieght=1", "unknown key data.train.0.wieght; did you mean 'weight'"),
        (
            "train.max_tokens=50",
            r"train.max_tokens 50 is below data.max_length \(or pack_length\) 64",
        ),
    ],
)
def test_wrong_settings_are_told(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        preset(tmp_path, override)


def test_no_source_at_a_step_is_refused(tmp_path: Path) -> None:
    nothing = [
        "train.epochs=null",
        "train.max_steps=9",
        "data.train.0.weight={0: 1, 4: 0}",
        "data.train.1.weight={0: 1, 4: 0}",
    ]
    with pytest.raises(ConfigError, match="at step 4 the weight of every source is 0"):
        preset(tmp_path, *nothing)


@pytest.mark.parametrize(
    "how",
    [
        {"weights": [1.0, 1.0, 0.0], "caps": [7, None, None]},
        {"weights": [0.3, 2.5, 1.0], "temperature": 2.0},
        {
            "weights": [1.0, 0.0, 1.0],
            "changes": [(12, [0.5, 1.0, 0.0]), (76, [0.0, 1.0, 0.2])],
            "block": 4,
        },
    ],
)
def test_the_items_drawn_are_known_without_going_through_the_order(how: dict[str, Any]) -> None:
    order = Order([40, 12, 30], seed=3, **how)
    for count in (0, 1, 5, 12, 13, 40, 75, 76, 100, 333, 2000):
        expected = np.zeros(82, bool)
        expected[Order([40, 12, 30], seed=3, **how).items(0, count)] = True
        assert np.array_equal(order.drawn_items(count), expected), count
    assert order.drawn_items(10**12).sum() == expected.sum(), "at once"
