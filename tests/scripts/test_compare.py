"""Toy presets of the literature's systems compose and teach; results are put side by side."""

from __future__ import annotations

import copy
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import World, make_llm, make_world

from avllm.config import load_config
from avllm.config_model import ModelConfig
from avllm.data.manifest import read_manifest
from avllm.data.schema import AudioPart
from avllm.models.building.placeholders import load_tokenizer
from avllm.models.modeling_avllm import AVLLM
from avllm.models.processing_avllm import AVProcessor
from avllm.models.words import load_words
from avllm.registry import build
from avllm.training.optim import assign, named_parameters
from avllm.training.task import Task

ROOT = Path(__file__).resolve().parents[2]
PRESETS = ROOT / "train/presets"
for folder in ("scripts", "scripts/toy_world/backbones"):
    sys.path.insert(0, str(ROOT / folder))
compare = importlib.import_module("compare")
one = importlib.import_module("comparison.one")
table = importlib.import_module("comparison.table")
eye = importlib.import_module("vision").vision_config
ear = importlib.import_module("audio").encoder_config

torch.set_num_threads(1)
SYSTEMS = compare.systems()
WIDTH = {"max_position_embeddings": 2048}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), clips=3)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llm(tmp_path_factory.mktemp("llm"), **WIDTH)


def composed(system: str, llm: Path) -> tuple[AVLLM, AVProcessor]:
    """A toy preset's model at its own sizes, with random backbones."""
    (first,) = (ROOT / "train/presets" / system / "toy").glob("stage1*.yaml")
    model = load_config(first).model
    assert model is not None
    settings = copy.deepcopy(model.model_dump())
    settings["llm"] = {"name": str(llm)}  # of width 32: no preset may name the toy LLM's
    for spec in settings["encoders"].values():
        spec.pop("name")
        spec["config"] = (eye if spec["type"] == "pvt_v2" else ear)().to_dict()
    description = ModelConfig.model_validate(settings)
    tokenizer, ids = load_tokenizer(description)
    torch.manual_seed(0)
    built = AVLLM.from_backbones(description, ids, load_words(tokenizer, description))
    return built, AVProcessor.from_model(built, tokenizer)


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_toy_preset_composes_and_every_stage_teaches(
    system: str, world: World, llm: Path
) -> None:
    model, processor = composed(system, llm)
    samples = read_manifest(world.questions)
    batch = processor(samples[:4], world.questions.parent, answer=True)
    for path in sorted((ROOT / "train/presets" / system / "toy").glob("stage*.yaml")):
        stage = load_config(path)
        for lora in stage.lora:
            model.add_lora(lora)
        if stage.data.rows is not None:
            build("row_makers", stage.data.rows)
        task = Task(model, stage.objectives).train()
        shares = assign(named_parameters(task), stage.trainable)
        assert any(share.lr for share in shares)
        losses, _ = task(batch)
        total = sum(losses.values())
        assert torch.isfinite(total)
        task.zero_grad()
        total.backward()
        learns = {n.split(".")[0] for n, p in model.named_parameters() if reached(p)}
        assert learns & {"connector", "fusion"}, f"{path.name} teaches {sorted(learns)}"


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_system_of_one_sense_goes_without_the_files_of_the_other(system: str) -> None:
    stages = [load_config(path) for path in sorted((PRESETS / system / "toy").glob("stage*.yaml"))]
    assert stages[0].model is not None
    encoders = stages[0].model.encoders
    media = {spec.get("medium", stream) for stream, spec in encoders.items()}
    expected = {0.01} if media == {"video", "audio"} else {1.0}
    assert {stage.data.max_skip_rate for stage in stages} == expected


def test_tokens_are_counted_of_the_clips_that_a_model_can_use(world: World, llm: Path) -> None:
    _, processor = composed("lita", llm)
    seen = read_manifest(world.questions)[0]
    heard = seen.model_copy(deep=True)
    (part,) = seen.media
    heard.messages[0].content[0] = AudioPart(audio=part.path)
    root = world.questions.parent
    assert one.media_tokens(processor, [seen, heard], root) == one.media_tokens(
        processor, [seen], root
    )


def reached(parameter: torch.nn.Parameter) -> bool:
    return parameter.grad is not None and bool(parameter.grad.any())


def test_stages_follow_each_other_within_the_folder_of_a_run(tmp_path: Path) -> None:
    first, second, third = one.stages("favor", tmp_path, seed=3, steps=75)
    assert first.output == str(tmp_path / "stage1_align")
    assert second.init == first.output
    assert third.init == second.output
    assert {c.seed for c in (first, second, third)} == {3}
    lengths = [c.train.max_steps for c in (first, second, third)]
    planned = [c.train.max_steps for c in one.stages("favor", tmp_path, seed=0, steps=None)]
    assert sum(lengths) == pytest.approx(75, abs=1)
    assert lengths[0] / lengths[2] == pytest.approx(planned[0] / planned[2], rel=0.1)


def test_an_unknown_system_is_named() -> None:
    with pytest.raises(SystemExit, match="favour"):
        compare.chosen_systems(["favour"])
    assert compare.chosen_systems(["all"]) == SYSTEMS


def result(system: str, seed: int, accuracy: float) -> dict[str, Any]:
    kinds = {"seen.colour": {"n_judged": 100, "accuracy": accuracy, "chance": 0.25}}
    swapped = {"seen.colour": {"n_judged": 100, "accuracy": 0.2, "chance": 0.25}}
    return {
        "system": system,
        "seed": seed,
        "figures": {"as_is": {"kinds": kinds}, "swap_video": {"kinds": swapped}},
        "media_tokens": 32.0,
        "trained_parameters": 1_500_000,
        "step_seconds": {"instruct": 0.5},
        "seconds": {"align": 60.0, "questions": 20.0},
        "memory_mb": 900,
    }


def test_accuracy_over_seeds_has_an_interval_of_questions_and_seeds(tmp_path: Path) -> None:
    results = [result("b", seed, share) for seed, share in enumerate([0.9, 0.8, 0.7])]
    results += [result("a", 0, 0.3)]
    table.write(results, tmp_path)
    found = json.loads((tmp_path / "compare.json").read_text())
    assert list(found) == ["a", "b"]
    colour = found["b"]["kinds"]["seen.colour"]
    assert colour["mean"] == pytest.approx(0.8)
    # Wilson's interval of 80 of 100 is 71.1 to 86.7; that of the seeds is wider.
    assert colour["low"] == pytest.approx(0.8 - 1.96 * 0.1 / 3**0.5)
    assert colour["high"] == pytest.approx(0.8 + 1.96 * 0.1 / 3**0.5)
    assert colour["swap_video"] == pytest.approx(0.2)
    assert found["a"]["kinds"]["seen.colour"]["low"] == pytest.approx(0.219, abs=1e-3)
    lines = (tmp_path / "compare.md").read_text().splitlines()
    assert any(line.startswith("| b | 3 | 32 | 1.50 M | 0.50 | 80 |") for line in lines)
    assert "80* (69-91)" in (tmp_path / "compare.md").read_text()
    assert "30 (22-40)" in (tmp_path / "compare.md").read_text()
    assert (tmp_path / "compare.png").stat().st_size > 5000
