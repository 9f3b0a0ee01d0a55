"""Hold every objective to its contract; a new file is tested as its cases say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from objectives.objective_cases import ObjectiveCase, cases
from tiny import World, make_world

from avllm.config_model import ModelConfig
from avllm.data.dataset import SampleDataset
from avllm.data.manifest import read_manifest
from avllm.models.building.placeholders import load_tokenizer
from avllm.models.modeling_avllm import AVLLM
from avllm.models.processing_avllm import AVProcessor
from avllm.registry import build
from avllm.training.start import Parts, padding


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("objectives"), clips=6)


@pytest.fixture(scope="module")
def parts(world: World) -> Parts:
    """A model with all that an objective may ask for: its Q-Former reads text."""
    qformer = {
        "type": "qformer",
        "stream": "video",
        "num_queries": 4,  # as a grid of 2 x 2, for objectives that read regions
        "dim": 8,
        "layers": 2,
        "heads": 2,
        "text": "llm",
    }
    description = ModelConfig.model_validate(
        world.model | {"connector": [qformer, *world.model["connector"]]}
    )
    tokenizer, ids = load_tokenizer(description)
    model = AVLLM.from_backbones(description, ids)
    return Parts(model, AVProcessor.from_model(model, tokenizer), [])


def batch_of(parts: Parts, case: ObjectiveCase, world: World, rows: int) -> Any:
    """The first rows that a case trains on; none gives the batch of a process with bad rows."""
    manifest = case.manifest(world)
    assert rows <= len(read_manifest(manifest))
    dataset = SampleDataset([str(manifest)], parts.processor, maker=case.maker)
    return padding(parts, blanks=False)([dataset[i] for i in range(rows)])[0].batch


@pytest.mark.parametrize("case", cases(), ids=str)
def test_a_sum_over_targets_that_teaches_the_connector(
    parts: Parts, world: World, case: ObjectiveCase
) -> None:
    torch.manual_seed(0)
    model = parts.model.train()
    model.zero_grad()
    objective = build("objectives", case.spec, model)
    batch = batch_of(parts, case, world, case.rows)
    weight = objective.weight(batch)
    assert isinstance(weight, float)
    assert weight > 0
    loss, figures = objective(model, batch)
    assert loss.shape == ()
    assert all(value.shape in ((), (2,)) for value in figures.values())  # a sum, or sum and count
    assert all(value.isfinite().all() for value in figures.values())
    assert set(objective.figures) <= figures.keys(), "what train.best_by may name"
    loss.backward()
    grads = [p.grad for p in model.connector.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in grads)
    assert any(g.abs().sum() > 0 for g in grads)
    assert all(p.grad is None for p in model.llm.parameters())  # what is frozen stays so


@pytest.mark.parametrize("case", cases(), ids=str)
def test_a_batch_without_targets_weighs_nothing_and_is_a_zero_on_the_graph(
    parts: Parts, world: World, case: ObjectiveCase
) -> None:
    objective = build("objectives", case.spec, parts.model.train())
    empty = batch_of(parts, case, world, 0)
    assert objective.weight(empty) == 0.0
    loss, figures = objective(parts.model, empty)
    assert float(loss.detach()) == 0.0
    assert all(not value.any() for value in figures.values())
