"""Named LoRA sets: which are active, what trains, what is saved; PEFT itself is the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import World, make_world
from torch import Tensor

from avllm.config_model import ModelConfig
from avllm.config_peft import LoraConfig
from avllm.errors import UserError
from avllm.models.building.adapter_config import set_of
from avllm.models.building.placeholders import load_tokenizer
from avllm.models.checkpoint_format import CheckpointError
from avllm.models.loading.digests import ALL_FILES, write_manifest
from avllm.models.lora import active_sets
from avllm.models.modeling_avllm import AVLLM

IDS = torch.tensor([[1, 5, 6, 7, 8, 9]])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), clips=1)


def bare_model(world: World) -> AVLLM:
    """A model without LoRA."""
    description = ModelConfig.model_validate(world.model)
    _, ids = load_tokenizer(description)
    return AVLLM.from_backbones(description, ids)


@pytest.fixture
def model(world: World) -> AVLLM:
    """A model with sets `default` and `scale_4`, both of which change what it says."""
    model = bare_model(world).add_lora(LoraConfig(r=2))
    model.add_lora(LoraConfig(name="scale_4", r=4, targets=["q_proj", "v_proj"]))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model.freeze().eval()


def logits(model: AVLLM, ids: Tensor = IDS) -> Tensor:
    """What the LLM makes of bare text."""
    return model.llm(input_ids=ids, use_cache=False).logits


def flags(model: AVLLM) -> dict[str, bool]:
    """Which parameters have gradients."""
    return {name: p.requires_grad for name, p in model.named_parameters()}


def delta(model: AVLLM, layer: str, name: str) -> Tensor:
    """What a set adds to a layer's weight, by the definition of LoRA: B A alpha / r."""
    module = model.llm.get_submodule(f"base_model.model.model.layers.0.self_attn.{layer}")
    settings = model.config.lora[name]
    product = module.lora_B[name].weight @ module.lora_A[name].weight
    return product * settings["alpha"] / settings["r"]


def test_exactly_the_named_sets_take_part_and_they_add_up(model: AVLLM) -> None:
    layer = model.llm.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    x = torch.randn(3, layer.in_features)
    base = layer.base_layer(x)
    for names in [(), ("default",), ("scale_4",), ("default", "scale_4")]:
        expected = base.clone()
        for name in names:
            expected += x @ delta(model, "q_proj", name).T
        with model.lora(names):
            torch.testing.assert_close(layer(x), expected)
    assert active_sets(model.llm) == ("default", "scale_4")


def test_no_set_is_the_bare_llm_to_the_bit(world: World, model: AVLLM) -> None:
    with model.lora(()):
        assert torch.equal(logits(model), logits(bare_model(world).eval()))
    with bare_model(world).lora(()):  # an LLM without any set has an empty choice, too
        pass


def nested(model: AVLLM) -> None:
    """Choose sets twice, and fail."""
    with model.lora(("default",)):
        with model.lora(()):
            assert active_sets(model.llm) == ()
        assert active_sets(model.llm) == ("default",)
        raise ZeroDivisionError


def test_blocks_nest_and_end_on_exceptions(model: AVLLM) -> None:
    before = flags(model)
    with pytest.raises(ZeroDivisionError):
        nested(model)
    assert active_sets(model.llm) == ("default", "scale_4")
    assert flags(model) == before


def test_a_set_that_is_not_there_is_refused_and_nothing_changes(model: AVLLM) -> None:
    with pytest.raises(UserError, match="scale_9"), model.lora(("default", "scale_9")):
        pass
    assert active_sets(model.llm) == ("default", "scale_4")


def test_requires_grad_is_the_rules_business(model: AVLLM) -> None:
    for name, parameter in model.named_parameters():
        if set_of(name) == "default":
            parameter.requires_grad_(False)
    before = flags(model)
    for names in [(), ("default",), ("scale_4",)]:
        with model.lora(names):
            logits(model)
            assert flags(model) == before
    assert flags(model) == before
    model.add_lora(LoraConfig(name="late", r=2))
    after = flags(model)
    assert {name: after[name] for name in before} == before
    assert all(after[name] for name in after if set_of(name) == "late")


def gradients(model: AVLLM, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Gradients of a forward pass with these sets; the backward pass comes under others."""
    model.zero_grad()
    with model.lora(names):
        loss = logits(model).float().logsumexp(-1).sum()
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("names", [("default",), ("scale_4",), ("default", "scale_4")])
def test_checkpointed_layers_are_recomputed_with_the_sets_of_the_forward_pass(
    model: AVLLM, names: tuple[str, ...]
) -> None:
    plain = gradients(model.train(), names)
    model.gradient_checkpointing_enable()
    model.llm.enable_input_require_grads()
    recomputed = gradients(model, names)
    assert {set_of(n) for n, g in plain.items() if g.abs().sum() > 0} == set(names)
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=0, atol=1e-6)


def test_two_sets_in_one_step_both_keep_their_gradients(model: AVLLM) -> None:
    apart = gradients(model, ("default",)) | gradients(model, ("scale_4",))
    model.zero_grad()
    losses = []
    for names in [("default",), ("scale_4",)]:
        with model.lora(names):
            losses.append(logits(model).float().logsumexp(-1).sum())
    torch.stack(losses).sum().backward()
    together = {n: p.grad for n, p in model.named_parameters() if set_of(n) and p.grad is not None}
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, apart[name])


def test_dropout_of_a_frozen_set_is_off_in_training(world: World) -> None:
    model = bare_model(world).add_lora(LoraConfig(r=2, dropout=0.5))
    model.add_lora(LoraConfig(name="new", copy_of="default", dropout=0.5))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(set_of(name) == "new")
    model.train()
    layer = model.llm.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert {name: d.training for name, d in layer.lora_dropout.items()} == {
        "default": False,
        "new": True,
    }


def test_a_copy_says_the_same_and_takes_its_sources_place(model: AVLLM) -> None:
    with model.lora(("default",)):
        said = logits(model)
    model.add_lora(LoraConfig(name="prefer", copy_of="default"))
    assert model.config.active_lora == ["prefer", "scale_4"]
    assert model.config.lora["prefer"]["r"] == 2
    with model.lora(("prefer",)):
        assert torch.equal(logits(model), said)
    with pytest.raises(UserError, match="'gone'") as error:
        model.add_lora(LoraConfig(name="other", copy_of="gone"))
    assert error.value.reason == "no_source"
    with pytest.raises(UserError) as error:
        model.add_lora(LoraConfig(name="prefer"))
    assert error.value.reason == "name_taken"
    with pytest.raises(ValueError, match="r, targets .*copy_of"):
        LoraConfig(copy_of="default", r=4, targets=["q_proj"])


def test_sets_are_saved_and_loaded_by_name(model: AVLLM, tmp_path: Path) -> None:
    model.add_lora(LoraConfig(name="prefer", copy_of="default"))
    model.save_pretrained(str(tmp_path))
    assert sorted(p.name for p in (tmp_path / "lora").iterdir()) == ["default", "prefer", "scale_4"]
    loaded = AVLLM.from_pretrained(str(tmp_path))
    assert loaded.config.lora == model.config.lora
    assert active_sets(loaded.llm) == ("prefer", "scale_4")
    for names in [(), ("default",), ("scale_4",), ("default", "scale_4")]:
        with model.lora(names), loaded.lora(names):
            assert torch.equal(logits(loaded), logits(model))


def test_peft_reads_a_set_by_itself(world: World, model: AVLLM, tmp_path: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    model.save_pretrained(str(tmp_path))
    llm = AutoModelForCausalLM.from_pretrained(world.llm)
    read = peft.PeftModel.from_pretrained(llm, tmp_path / "lora" / "scale_4").eval()
    with model.lora(("scale_4",)):
        assert torch.equal(read(input_ids=IDS).logits, logits(model))


def drop_half(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if "lora_A" in key}


def rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.replace("q_proj", "x_proj"): tensor for key, tensor in tensors.items()}


def add(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {"base_model.model.more.lora_A.weight": torch.zeros(2, 2)}


def empty(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {}


def cut(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor[:1].contiguous() for key, tensor in tensors.items()}


@pytest.mark.parametrize("change", [drop_half, rename, add, empty, cut])
def test_a_set_with_other_tensors_is_refused(model: AVLLM, tmp_path: Path, change: Any) -> None:
    model.save_pretrained(str(tmp_path))
    path = tmp_path / "lora" / "scale_4" / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)
    with pytest.raises(CheckpointError, match="scale_4"):
        AVLLM.from_pretrained(str(tmp_path))


def test_a_set_that_is_missing_renamed_or_damaged_is_refused(model: AVLLM, tmp_path: Path) -> None:
    model.save_pretrained(str(tmp_path))
    folder = tmp_path / "lora" / "scale_4"
    folder.rename(tmp_path / "lora" / "scale_8")
    with pytest.raises(CheckpointError, match="scale_8"):
        AVLLM.from_pretrained(str(tmp_path))
    (tmp_path / "lora" / "scale_8").rename(folder)
    (folder / "adapter_model.safetensors").write_bytes(b"half")
    write_manifest(tmp_path, ALL_FILES)
    with pytest.raises(CheckpointError, match="damaged"):
        AVLLM.from_pretrained(str(tmp_path))


def test_a_set_that_was_merged_leaves_the_folder(model: AVLLM, tmp_path: Path) -> None:
    model.save_pretrained(str(tmp_path))
    with model.lora(("scale_4",)):
        said = logits(model)
    model.merge_lora(["scale_4"])
    torch.testing.assert_close(logits(model), said, rtol=0, atol=1e-5)
    assert model.config.lora == {}
    with pytest.raises(UserError) as error:
        model.merge_lora()
    assert error.value.reason == "nothing_to_merge"
    model.add_lora(LoraConfig(name="next", r=2)).save_pretrained(str(tmp_path))
    assert [p.name for p in (tmp_path / "lora").iterdir()] == ["next"]
    assert torch.equal(logits(AVLLM.from_pretrained(str(tmp_path))), logits(model))


def test_a_model_is_built_from_its_config_with_its_sets(model: AVLLM) -> None:
    model.config.lora["default"]["active"] = False
    built = AVLLM(model.config)
    assert built.state_dict().keys() == model.state_dict().keys()
    assert active_sets(built.llm) == ("scale_4",)
