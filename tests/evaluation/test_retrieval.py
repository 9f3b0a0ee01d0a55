"""Retrieval: recalls by hand, and a stage-1 run whose projections come back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import World, make_world, settings
from tiny_runs import run

from avllm.evaluation.retrieval import contrastive_of, distinct, recall, retrieval
from avllm.models.checkpoint import CheckpointError


def test_recall_by_hand() -> None:
    scores = np.eye(4)
    scores[3] = [0.9, 0.8, 0.1, 0.5]  # the fourth caption finds its clip third
    found = recall(scores)
    assert (found["n"], found["r1"], found["r5"], found["r10"]) == (4, 0.75, 1.0, 1.0)
    assert (found["median_rank"], found["chance"]) == (1.0, 0.25)
    assert found["r1_low"] < 0.75 < found["r1_high"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("retrieval"), clips=6)


@pytest.fixture(scope="module")
def aligned(world: World) -> Path:
    rules = [["^connector", 1e-2], ["^objectives", 1e-2], [".*", None]]
    chosen = settings(world, world.root / "align", "align", train__max_steps=12, train__batch_size=6, trainable=rules)
    return run(chosen)


def test_a_stage_1_run_is_searched_with_what_it_learned(world: World, aligned: Path) -> None:
    found = retrieval(aligned, world.captions, limit=200)
    assert found == retrieval(aligned, world.captions, limit=200, batch_size=2)
    assert found["n"] == 5  # two of the six captions are equal
    assert found["r10"] == 1.0
    assert found["r1"] > found["chance"]
    assert retrieval(aligned, world.captions, limit=4)["n"] == 4


def test_projections_and_temperature_come_back(aligned: Path) -> None:
    from avllm.models.modeling_avllm import AVLLM

    objective = contrastive_of(AVLLM.from_pretrained(str(aligned)), aligned)
    assert objective.log_temperature.item() != pytest.approx(np.log(0.07))
    assert all(torch.isfinite(p).all() for p in objective.parameters())


def test_a_run_without_projections_says_so(aligned: Path, world: World, tmp_path: Path) -> None:
    for file in aligned.iterdir():
        if file.is_file() and not file.name.startswith("objectives"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match="objectives.safetensors"):
        retrieval(tmp_path, world.captions)


def test_equal_captions_count_once(world: World) -> None:
    from avllm.data.manifest import parse_row

    rows = [json.loads(line) for line in world.captions.read_text().splitlines()]
    samples = [parse_row(json.dumps(r), "test") for r in rows]
    assert distinct(samples) == [s for i, s in enumerate(samples) if i != 4]  # the fifth says what the first says
