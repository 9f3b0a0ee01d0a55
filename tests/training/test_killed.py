"""SIGKILL at random moments of a run with everything on its data side: it ends the same."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from tiny import World, make_world, settings
from tiny_runs import difference, rows, run, start, train, weights

STEPS = 8


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A tiny world for all tests of this file."""
    return make_world(tmp_path_factory.mktemp("world"))


def asked_of(world: World, folder: Path) -> dict[str, Any]:
    """A mixture with cap, temperature and curriculum; packing, token budget, cache, workers."""
    asked = settings(
        world,
        folder / "run",
        lora={"r": 2, "alpha": 4, "dropout": 0.3},
        trainable=[["^connector", 1e-3], ["lora_", 1e-3], [".*", None]],
    )
    quarantine = folder / "quarantine.txt"
    quarantine.write_text("colour-1\tsilent\n")
    asked["data"] |= {
        "train": [
            {"manifest": str(world.captions), "weight": {0: 2, 4: 0.5, 7: 1}, "max_rows": 5},
            {"manifest": str(world.questions), "weight": {0: 0.5, 4: 1}},
        ],
        "temperature": 2.0,
        "quarantine": str(quarantine),
        "max_skip_rate": 0.2,
        "pack": "both",
        "max_length": 120,
        "cache": str(folder / "cache"),
        "num_workers": 2,
    }
    asked["train"] |= {
        "max_steps": STEPS,
        "batch_size": 4,
        "max_tokens": 240,
        "save_every": 2,
        "warmup": 0,
    }
    return asked


def killed_at(asked: dict[str, Any], steps: int, seconds: float) -> bool:
    """Start the run, kill it some steps after its newest resume point; False when it ended."""
    run_folder, began = Path(asked["output"]), time.time()
    saved = max(
        (int(p.name.removeprefix("step_")) for p in run_folder.glob("checkpoints/step_*")),
        default=0,
    )
    child, metrics = start(train, asked), run_folder / "metrics.jsonl"
    while child.is_alive() and steps:
        # older lines are of the run before, until this one has dropped those after its resume point
        if (
            metrics.is_file()
            and metrics.stat().st_mtime > began
            and metrics.read_text().count("\n") >= saved + steps
        ):
            break
        time.sleep(0.002)
    child.join(seconds)
    if child.exitcode is not None:
        assert child.exitcode == 0
        return False
    os.kill(child.pid or 0, signal.SIGKILL)
    child.join()
    return True


def same_after_kills(world: World, tmp_path: Path, kills: int) -> None:
    """Kill one run as often as asked, let it end, and compare it with an undisturbed one."""
    (tmp_path / "straight").mkdir()
    began = time.monotonic()
    straight = run(asked_of(world, tmp_path / "straight"))
    whole = time.monotonic() - began
    drawn, rounds = random.Random(kills), 0
    while kills:
        rounds += 1
        folder = tmp_path / str(rounds)
        folder.mkdir()
        asked, ended = asked_of(world, folder), False
        while (
            kills and not ended
        ):  # in the beginning of a run (the cache is filled then), and between its steps
            steps = drawn.choice([0, 1, 2, 3])
            ended = not killed_at(asked, steps, drawn.uniform(0, 0.3 if steps else whole / 2))
            kills -= not ended
        found = run(asked)
        assert rows(found) == rows(straight)
        assert difference(weights(found), weights(straight)) == 0.0
        assert (found / "skipped.jsonl").read_text() == (straight / "skipped.jsonl").read_text()
    assert len(rows(straight)) == STEPS


def test_a_run_killed_at_two_random_moments_ends_as_if_nothing_had_been(
    world: World, tmp_path: Path
) -> None:
    same_after_kills(world, tmp_path, kills=2)


@pytest.mark.slow
@pytest.mark.skipif("AVLLM_SLOW" not in os.environ, reason="takes minutes; set AVLLM_SLOW=1")
def test_a_run_killed_at_ten_random_moments_ends_as_if_nothing_had_been(
    world: World, tmp_path: Path
) -> None:
    same_after_kills(world, tmp_path, kills=10)
