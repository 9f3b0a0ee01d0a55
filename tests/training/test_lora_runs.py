"""Stages with named LoRA sets: frozen ones stay so, and killed runs go on bit-identically."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tiny import World, make_world, settings
from tiny_runs import difference, kill_after, rows, run, train, weights
from torch import Tensor

from avllm.errors import UserError
from avllm.training.optim import RuleError

LORA = {"r": 2, "alpha": 4}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A tiny world for all tests of this file."""
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def instructed(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage that put the set `default` on the LLM."""
    rules = [["^connector", 1e-3], ["lora_", 1e-2], [".*", None]]
    folder = tmp_path_factory.mktemp("instructed") / "run"
    return run(stage(world, folder, None, lora=LORA, trainable=rules, train__warmup=0))


def test_a_set_that_is_not_active_does_not_train(
    world: World, instructed: Path, tmp_path: Path
) -> None:
    copy = {"name": "other", "copy_of": "default"}
    rules = [["lora_", 1e-2], [".*", None]]
    with pytest.raises(RuleError, match="default"):
        train(stage(world, tmp_path / "run", instructed, lora=copy, trainable=rules))


def stage(
    world: World, folder: Path, init: Path | None, kind: str = "caption", **changes: Any
) -> dict[str, Any]:
    """A stage that starts from a run."""
    asked = settings(world, folder, kind, **changes)
    if init is not None:
        asked |= {"init": str(init), "init_from_scratch": True}
        del asked["model"]
    return asked


def lora_of(folder: Path, name: str = "default") -> dict[str, Tensor]:
    """The tensors of a set."""
    return load_file(folder / "lora" / name / "adapter_model.safetensors")


def test_a_frozen_set_stays_frozen_beside_the_bare_llms_text_side_and_the_run_resumes(
    world: World, instructed: Path, tmp_path: Path
) -> None:
    """Switching the set off for the text may not switch its gradients on."""
    changes: dict[str, Any] = {
        "trainable": [["lora_", None], ["^connector", 1e-3], ["^objectives", 1e-3], [".*", None]],
        "objectives": [{"type": "contrastive", "dim": 16, "text": "llm"}, {"type": "next_token"}],
        "train__warmup": 0,
        "train__max_steps": 6,
    }
    straight = run(stage(world, tmp_path / "straight", instructed, **changes))
    assert difference(lora_of(straight), lora_of(instructed)) == 0.0
    asked = stage(world, tmp_path / "run", instructed, **changes, train__save_every=2)
    kill_after(asked, 4)
    killed = run(asked)
    assert rows(killed) == rows(straight)
    assert difference(weights(killed), weights(straight)) == 0.0
    objectives = [load_file(folder / "objectives.safetensors") for folder in (killed, straight)]
    assert difference(*objectives) == 0.0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_set_trains_beside_a_frozen_one_and_a_killed_run_goes_on(
    world: World, instructed: Path, tmp_path: Path, checkpointing: bool
) -> None:
    changes: dict[str, Any] = {
        "lora": [
            {"name": "prefer", "copy_of": "default", "dropout": 0.3},
            {"name": "more", **LORA},
        ],
        "trainable": [["lora_[AB].(prefer|more)", 1e-2], ["^connector", 1e-3], [".*", None]],
        "train__gradient_checkpointing": checkpointing,
        "train__warmup": 0,
        "train__max_steps": 6,
    }
    straight = run(stage(world, tmp_path / "straight", instructed, **changes))
    assert difference(lora_of(straight), lora_of(instructed)) == 0.0
    assert difference(lora_of(straight, "prefer"), lora_of(instructed)) > 0
    asked = stage(world, tmp_path / "run", instructed, **changes, train__save_every=2)
    kill_after(asked, 4)
    killed = run(asked)
    assert rows(killed) == rows(straight)
    assert difference(weights(killed), weights(straight)) == 0.0


def test_sets_that_do_not_fit_the_stage_are_refused(
    world: World, instructed: Path, tmp_path: Path
) -> None:
    rules = [["lora_", 1e-3], ["^connector", 1e-3], [".*", None]]
    with pytest.raises(UserError, match="leave out lora"):
        train(stage(world, tmp_path / "again", instructed, lora=LORA, trainable=rules))
    frozen = [["lora_[AB].default", 1e-3], ["^connector", 1e-3], [".*", None]]
    with pytest.raises(RuleError, match="other"):
        train(
            stage(
                world,
                tmp_path / "idle",
                instructed,
                lora=LORA | {"name": "other"},
                trainable=frozen,
            )
        )
