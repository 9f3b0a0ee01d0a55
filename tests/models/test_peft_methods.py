"""Options of LoRA and other methods of PEFT: saved and loaded strictly, merged, trained."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from tiny import World, make_world, settings
from tiny_runs import difference, kill_after, rows, run, weights
from torch import Tensor

from avllm.config import RunConfig
from avllm.config_model import ModelConfig
from avllm.config_peft import METHODS, PEFT_NAMES, REFUSED_OPTIONS, LoraConfig, PeftConfig
from avllm.errors import UserError
from avllm.models.building.adapter_config import peft_config, record_of, set_of
from avllm.models.building.placeholders import load_tokenizer
from avllm.models.checkpoint_format import CheckpointError
from avllm.models.loading.digests import ALL_FILES, write_manifest
from avllm.models.modeling_avllm import AVLLM

IDS = torch.tensor([[1, 5, 6, 7, 8, 9]])
SETS: dict[str, LoraConfig | PeftConfig] = {
    "dora": LoraConfig(r=2, use_dora=True),
    "rslora": LoraConfig(r=2, use_rslora=True, init_lora_weights="gaussian"),
    "patterns": LoraConfig(
        r=2,
        targets=["q_proj", "v_proj"],
        rank_pattern={"q_proj": 3},
        alpha_pattern={"v_proj": 5},
        layers_to_transform=[1],
    ),
    "excluded": LoraConfig(r=2, exclude_modules=["down_proj"]),
    "ia3": PeftConfig(type="ia3"),
    "loha": PeftConfig(type="loha", r=2),  # type: ignore[call-arg]
    "lokr": PeftConfig(type="lokr", r=2, targets=["q_proj", "v_proj"]),  # type: ignore[call-arg]
    "vera": PeftConfig(type="vera", r=4, targets=["q_proj", "o_proj"]),  # type: ignore[call-arg]
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def adapted(world: World, one: LoraConfig | PeftConfig) -> AVLLM:
    """A model with a set that changes what it says."""
    description = ModelConfig.model_validate(world.model)
    _, ids = load_tokenizer(description)
    model = AVLLM.from_backbones(description, ids).add_lora(one).freeze().eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if set_of(name):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def logits(model: AVLLM) -> Tensor:
    with torch.no_grad():
        return model.llm(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("name", SETS)
def test_a_set_is_saved_loaded_and_merged_to_the_same_model(
    world: World, tmp_path: Path, name: str
) -> None:
    model = adapted(world, SETS[name])
    said = logits(model)
    with model.lora(()):
        assert not torch.allclose(logits(model), said, atol=1e-3)
    model.save_pretrained(str(tmp_path))
    loaded = AVLLM.from_pretrained(str(tmp_path))
    assert loaded.config.lora == model.config.lora
    assert torch.equal(logits(loaded), said)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad and n.startswith("llm")} == {
        n for n, p in loaded.named_parameters() if set_of(n)
    }
    torch.testing.assert_close(logits(loaded.merge_lora()), said, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SETS)
def test_peft_reads_the_set_by_itself(world: World, tmp_path: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM

    model = adapted(world, SETS[name])
    model.save_pretrained(str(tmp_path))
    llm = AutoModelForCausalLM.from_pretrained(world.llm)
    read = peft.PeftModel.from_pretrained(llm, tmp_path / "lora" / "default").eval()
    with torch.no_grad():
        assert torch.equal(read(input_ids=IDS).logits, logits(model))


@pytest.mark.parametrize("name", ["patterns", "dora", "ia3", "vera"])
def test_a_set_with_other_tensors_or_options_is_refused(
    world: World, tmp_path: Path, name: str
) -> None:
    adapted(world, SETS[name]).save_pretrained(str(tmp_path))
    path = tmp_path / "lora" / "default" / "adapter_model.safetensors"
    whole = load_file(path)
    first = sorted(whole)[0]
    save_file({key: tensor for key, tensor in whole.items() if key != first}, path)
    write_manifest(tmp_path, ALL_FILES)
    with pytest.raises(CheckpointError) as refused:
        AVLLM.from_pretrained(str(tmp_path))
    assert refused.value.reason == "lora_weights"
    save_file(whole, path)
    options = tmp_path / "lora" / "default" / "adapter_config.json"
    text = options.read_text()
    options.write_text(text.replace('"init_', '"exclude_modules": ["x"], "init_', 1))
    write_manifest(tmp_path, ALL_FILES)
    with pytest.raises(CheckpointError) as refused:
        AVLLM.from_pretrained(str(tmp_path))
    assert refused.value.reason == "lora_config"


@pytest.mark.parametrize("method", ["ia3", "vera", "dora"])
def test_a_set_trains_and_a_killed_run_goes_on(world: World, tmp_path: Path, method: str) -> None:
    one: dict[str, Any] = {"peft": {"type": method}}
    if method == "dora":
        one = {"lora": {"r": 2, "use_dora": True}}
    changes = {
        "trainable": [["(lora|ia3|vera)_", 1e-2], ["^connector", 1e-3], [".*", None]],
        "train__warmup": 0,
        "train__max_steps": 6,
        **one,
    }
    straight = run(settings(world, tmp_path / "straight", **changes))
    asked = settings(world, tmp_path / "run", **changes, train__save_every=2)
    kill_after(asked, 4)
    killed = run(asked)
    assert rows(killed) == rows(straight)
    assert difference(weights(killed), weights(straight)) == 0.0
    trained = AVLLM.from_pretrained(straight)
    with trained.lora(()):
        bare = logits(trained)
    assert not torch.equal(logits(trained), bare)


def test_each_option_of_lora_is_taken_or_refused_with_a_reason() -> None:
    """A newer PEFT may have more: they are unknown keys until they are listed."""
    fields = [field.name for field in dataclasses.fields(peft.LoraConfig)]
    names = {PEFT_NAMES.get(name, name) for name in fields}
    assert names - LoraConfig.model_fields.keys() - REFUSED_OPTIONS.keys() == set()


@pytest.mark.parametrize("method", METHODS)
def test_further_methods_take_peft_s_own_options(method: str) -> None:
    fields = {field.name for field in dataclasses.fields(getattr(peft, METHODS[method]))}
    assert "target_modules" in fields
    record = {"type": method, "targets": ["q_proj"], "active": True}
    assert peft_config(record).target_modules == {"q_proj"}
    with pytest.raises(UserError, match="'target_modules'") as refused:
        peft_config(record | {"target_module": ["x"]})
    assert refused.value.reason == "unknown_option"


@pytest.mark.parametrize(
    "section, named",
    [
        ({"lora": {"use_dorra": True}}, "lora.0.use_dorra"),
        ({"lora": {"modules_to_save": ["lm_head"]}}, "modules_to_save.*trainable"),
        ({"lora": {"init_lora_weights": "pissa"}}, "init_lora_weights"),
        ({"lora": {"targets": "all-linear", "target_modules": ["q_proj"]}}, "same setting"),
        ({"peft": {"type": "prefix_tuning"}}, "prefix_tuning.*virtual tokens"),
        ({"peft": {"type": "veera"}}, "'vera'"),
        ({"peft": {"type": "lora"}}, "own key"),
        ({"peft": {"type": "ia3"}, "lora": {"r": 2}}, "ia3 and lora"),
    ],
)
def test_what_peft_has_and_a_stage_cannot_keep_is_refused(
    world: World, tmp_path: Path, section: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValidationError, match=f"(?s){named}"):
        RunConfig.model_validate(settings(world, tmp_path, **section))


def test_peft_s_names_are_understood() -> None:
    given = {"target_modules": ["q_proj"], "lora_alpha": 3, "lora_dropout": 0.1}
    one = LoraConfig.model_validate(given)
    assert (one.targets, one.alpha, one.dropout) == (["q_proj"], 3, 0.1)
    assert record_of(one) == {
        "targets": ["q_proj"],
        "active": True,
        "r": 16,
        "alpha": 3,
        "dropout": 0.1,
    }


@pytest.mark.parametrize("name", ["dora", "ia3", "vera"])
def test_a_copy_says_the_same_and_takes_its_sources_place(world: World, name: str) -> None:
    model = adapted(world, SETS[name])
    said = logits(model)
    copy: dict[str, Any] = {"name": "prefer", "copy_of": "default"}
    kind = record_of(SETS[name]).get("type")
    model.add_lora(PeftConfig(type=kind, **copy) if kind else LoraConfig(**copy))
    assert model.config.active_lora == ["prefer"]
    assert torch.equal(logits(model), said)
    with model.lora(("default",)):
        assert torch.equal(logits(model), said)


def test_one_method_at_a_time(world: World) -> None:
    model = adapted(world, LoraConfig(r=2))
    with pytest.raises(UserError) as refused:
        model.add_lora(PeftConfig(type="ia3", name="other"))
    assert refused.value.reason == "other_method"


@pytest.mark.parametrize(
    "options",
    [{"init_lora_weights": "pissa"}, {"layer_replication": [[0, 2], [1, 2]]}],
    ids=["other weights", "other layers"],
)
def test_a_checkpoint_cannot_ask_for_options_that_a_preset_cannot(
    world: World, tmp_path: Path, options: dict[str, Any]
) -> None:
    adapted(world, LoraConfig(r=2)).save_pretrained(str(tmp_path))
    for path in (tmp_path / "config.json", tmp_path / "lora" / "default" / "adapter_config.json"):
        content = json.loads(path.read_text())
        record = content["lora"]["default"] if "lora" in content else content
        record.update(options)
        path.write_text(json.dumps(content))
    write_manifest(tmp_path, ALL_FILES)
    with pytest.raises(CheckpointError) as refused:
        AVLLM.from_pretrained(str(tmp_path))
    assert refused.value.reason == "lora_config"
