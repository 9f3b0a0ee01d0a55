"""Every shipped preset parses, composes and finds the parameters that its rules speak of."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import make_llm

from avllm.config import RunConfig, load_config
from avllm.config_model import ModelConfig
from avllm.models.building.placeholders import load_tokenizer
from avllm.models.modeling_avllm import AVLLM
from avllm.training.optim import assign, named_parameters
from avllm.training.task import Task

ROOT = Path(__file__).resolve().parents[1]
PRESETS = sorted((ROOT / "train" / "presets").rglob("*.yaml"))
STAGE_OF = {"stage1": "align", "stage2": "caption", "stage3": "instruct"}
SYSTEMS = sorted({p.parent for p in PRESETS})
VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "patch_size": 8,
}
BACKBONES: dict[str, dict[str, Any]] = {
    "siglip": VIT | {"image_size": 32},
    "clip": VIT | {"image_size": 32},
    "eva": VIT | {"image_size": 32},
    "dinov2": {k: v for k, v in VIT.items() if k != "intermediate_size"} | {"image_size": 32},
    "ast": VIT | {"max_length": 1024, "num_mel_bins": 128, "patch_size": 16},
    "pvt_v2": {
        "image_size": 32,
        "num_encoder_blocks": 2,
        "depths": [1, 1],
        "hidden_sizes": [16, 32],
        "num_attention_heads": [1, 2],
        "mlp_ratios": [2, 2],
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "sr_ratios": [2, 1],
    },
    "whisper": {
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "max_source_positions": 1500,
    },
    "mel_conv": {"hidden_size": 32},
}


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_preset_parses_and_says_its_stage(path: Path) -> None:
    config = load_config(path)
    assert config.stage == STAGE_OF[path.stem.split("_")[0]]
    assert (config.model is None) == (config.stage != "align" and not config.init_from_scratch)
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60, "a preset is a page"


@pytest.mark.parametrize("folder", SYSTEMS, ids=lambda p: p.name)
def test_stages_follow_each_other(folder: Path) -> None:
    stages = {p.stem.split("_")[0]: load_config(p) for p in sorted(folder.glob("*.yaml"))}
    assert set(stages) == set(STAGE_OF)
    assert stages["stage2"].init == stages["stage1"].output
    assert stages["stage3"].init == stages["stage2"].output


def small(model: ModelConfig, llm: Path) -> ModelConfig:
    """The same composition on tiny random backbones; the connector keeps its inner sizes."""
    settings = copy.deepcopy(model.model_dump())
    settings["llm"] = {"name": str(llm)}
    for spec in settings["encoders"].values():
        spec.pop("name", None)
        spec.pop("dtype", None)
        spec.setdefault("config", BACKBONES[spec["type"]])
    for spec in settings["connector"]:
        spec.pop("init", None)
        if spec["type"] == "qformer":  # as many, but small
            spec |= {"dim": 32, "heads": 2, "layers": 2}
    return ModelConfig.model_validate(settings)


@pytest.mark.parametrize("folder", SYSTEMS, ids=lambda p: p.name)
def test_preset_composes_and_its_rules_find_their_parameters(folder: Path, tmp_path: Path) -> None:
    stages = [load_config(p) for p in sorted(folder.glob("*.yaml"))]
    first: RunConfig = stages[0]
    assert first.model is not None
    description = small(first.model, make_llm(tmp_path / "llm"))
    tokenizer, ids = load_tokenizer(description)
    torch.manual_seed(0)
    model = AVLLM.from_backbones(description, ids)
    assert set(ids) == set(model.connector.out_streams), (
        "each stream that reaches the LLM has its placeholder"
    )
    for stage in stages:
        for lora in stage.lora:
            model.add_lora(lora)
        shares = assign(named_parameters(Task(model, stage.objectives)), stage.trainable)
        assert any(share.lr for share in shares)


def test_every_yaml_of_the_project_parses() -> None:
    tracked = [
        p
        for part in ("train", "avllm", "serve", "data_recipes")
        for p in (ROOT / part).rglob("*.yaml")
    ]
    assert tracked
    for path in tracked:
        assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict), path
