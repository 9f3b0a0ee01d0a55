"""Rows that share their media behind one copy of it: the same loss and gradients as one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import World, make_world, settings

from avllm.config import RunConfig
from avllm.data.collate import Row
from avllm.data.packing import pack_rows, shared_length
from avllm.training.start import build_dataset, build_parts
from avllm.training.task import Task


def bare_row(ids: list[int], labels: list[int], media: int) -> Row:
    """A row whose first `media` tokens are placeholders."""
    places = torch.arange(len(ids)) < media
    return Row("r", torch.tensor(ids), torch.tensor(labels), [], places, targets=["x"])


def test_the_shared_part_ends_before_the_token_that_predicts_a_target() -> None:
    one = bare_row([9, 9, 4, 5, 6], [-100, -100, -100, -100, 6], 2)
    two = bare_row([9, 9, 4, 5, 7, 8], [-100, -100, -100, -100, 7, 8], 2)
    assert shared_length([one, two]) == 3
    (packed,) = pack_rows([one, two], 20)
    assert packed.input_ids.tolist() == [9, 9, 4, 5, 6, 5, 7, 8]
    assert packed.labels.tolist() == [-100, -100, -100, -100, 6, -100, 7, 8]
    assert packed.position_ids.tolist() == [0, 1, 2, 3, 4, 3, 4, 5]
    assert packed.segments[:, 1].tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    assert packed.num_targets == one.num_targets + two.num_targets
    assert packed.targets == ["x", "x"]


def test_packs_are_no_longer_than_asked_and_media_is_never_behind_the_shared_part() -> None:
    rows = [bare_row([9, 9, 4, n, 6], [-100] * 4 + [6], 2) for n in (1, 2, 3)]
    assert [len(r.input_ids) for r in pack_rows(rows, 7)] == [7, 5]
    apart = [bare_row([n, 9, 4, 6], [-100] * 3 + [6], 2) for n in (1, 2)]
    assert pack_rows(apart, 50) == apart


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Three clips with two questions each."""
    return make_world(tmp_path_factory.mktemp("world"), clips=3)


def test_packed_and_unpacked_have_the_same_loss_and_gradients(world: World, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    config = RunConfig.model_validate(settings(world, tmp_path, data__train=str(world.questions)))
    torch.manual_seed(0)
    parts = build_parts(config)
    task = Task(parts.model, config.objectives)
    found = []
    for pack in (False, True):
        config.data.pack = pack
        dataset = build_dataset(config, config.data.train, parts)
        rows = [row for i in range(len(dataset)) for row in dataset[i].rows]
        assert len(rows) == (3 if pack else 6)
        batch = parts.processor.collate(rows)
        task.zero_grad()
        losses, _ = task(batch)
        losses["next_token"].backward()
        grads = {n: p.grad.clone() for n, p in parts.model.connector.named_parameters()}
        found.append((losses["next_token"].item(), batch.num_targets, grads))
    (loss, count, grads), (packed_loss, packed_count, packed_grads) = found
    assert count == packed_count
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    for name, grad in grads.items():
        torch.testing.assert_close(packed_grads[name], grad, rtol=1e-4, atol=1e-5)
