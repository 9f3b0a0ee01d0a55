"""A stage that cannot teach what it is meant to is refused before its first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import World, make_world, settings
from tiny_runs import train

from avllm.config import RunConfig
from avllm.errors import UserError
from avllm.training.optim import RuleError
from avllm.training.start import build_parts, check_comparisons
from avllm.training.task import Task
from avllm.training.trainer import Trainer

MATCH = [{"type": "answer_match", "hidden": 16, "dim": 8}]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), clips=4)


@pytest.fixture(autouse=True)
def no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "step", lambda *_: pytest.fail("a step was taken"))


@pytest.mark.parametrize(
    "changes",
    [
        {"train__batch_size": 1, "train__accumulate": 4},
        {"objectives": MATCH, "train__batch_size": 1},
        {"data__train": [{"manifest": "captions", "max_rows": 1}]},
        {
            "data__train": ["questions", {"manifest": "captions", "max_rows": 1}],
            "data__batches": "one_source",
        },
    ],
)
def test_an_objective_that_compares_needs_something_to_compare(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    for name, path in (("captions", world.captions), ("questions", world.questions)):
        (tmp_path / name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        train(settings(world, tmp_path / "run", "align", **changes))
    assert refused.value.reason == "nothing_to_compare"


def test_processes_pack_and_objectives_decide_what_is_compared(
    world: World, tmp_path: Path
) -> None:
    def check(processes: int, objectives: list[dict[str, Any]], pack: bool = False) -> None:
        asked = settings(world, tmp_path, "align", objectives=objectives, data__pack=pack)
        asked["train"]["batch_size"] = 1
        config = RunConfig.model_validate(asked)
        check_comparisons(config, Task(model, config.objectives), [100], processes)

    model = build_parts(RunConfig.model_validate(settings(world, tmp_path, "align"))).model
    contrastive = [{"type": "contrastive", "dim": 8}]
    check(2, contrastive)  # negatives are those of all processes
    check(1, [{"type": "next_token"}])
    check(1, MATCH, pack=True)  # questions about one clip
    for processes, objectives, pack in [(2, MATCH, False), (1, contrastive, True)]:
        with pytest.raises(UserError) as refused:
            check(processes, objectives, pack)
        assert refused.value.reason == "nothing_to_compare"


def test_a_head_with_random_weights_that_nothing_trains_is_refused(
    world: World, tmp_path: Path
) -> None:
    rules = [["^connector", 1e-3], [".*", None]]
    with pytest.raises(RuleError, match=r"objectives\\.contrastive") as refused:
        train(settings(world, tmp_path / "run", "align", trainable=rules))
    assert refused.value.reason == "frozen_objective"
    assert refused.value.setting == "trainable"
