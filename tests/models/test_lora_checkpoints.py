"""LoRA in checkpoints: beside trained weights of the LLM, merged for a while, and for good."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import World, make_world
from torch import Tensor

from avllm.config_model import ModelConfig
from avllm.config_peft import LoraConfig
from avllm.data.schema import Sample
from avllm.errors import UserError
from avllm.models.building.placeholders import load_tokenizer
from avllm.models.checkpoint import mark_trained, save_checkpoint
from avllm.models.checkpoint_format import CheckpointError, read_manifest_of
from avllm.models.modeling_avllm import AVLLM
from avllm.models.processing_avllm import AVProcessor

ASKED = Sample.model_validate(
    {"id": "s", "messages": [{"role": "user", "content": [{"type": "video", "video": "000.mp4"}]}]}
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), clips=1)


def adapted(world: World, **llm: str) -> tuple[AVLLM, AVProcessor]:
    """A model whose adapters change what it says."""
    settings = ModelConfig.model_validate(world.model | {"llm": {"name": str(world.llm), **llm}})
    tokenizer, ids = load_tokenizer(settings)
    torch.manual_seed(1)
    model = AVLLM.from_backbones(settings, ids).add_lora(LoraConfig(r=2)).freeze()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model.eval(), AVProcessor.from_model(model, tokenizer)


def logits(model: AVLLM, processor: AVProcessor, world: World) -> Tensor:
    clips = [
        processor.prepare(clip) for clip in processor.load_clips(ASKED.media, world.captions.parent)
    ]
    with torch.no_grad():
        return model(processor.collate([processor.row(ASKED, clips, answer=False)])).logits


def test_trained_weights_of_the_llm_are_kept_beside_its_adapters(
    world: World, tmp_path: Path
) -> None:
    model, processor = adapted(world)
    with torch.no_grad():
        for name, parameter in model.llm.named_parameters():
            if (
                "q_proj.base_layer" in name or "embed_tokens" in name
            ):  # one that PEFT wraps, one that it does not
                parameter.requires_grad_(True).add_(0.05)
    mark_trained(model)
    said = logits(model, processor, world)
    save_checkpoint(model, processor, tmp_path, [])
    assert torch.equal(logits(AVLLM.from_pretrained(tmp_path), processor, world), said)
    model.llm.merge_adapter()
    with pytest.raises(CheckpointError, match="unmerge_adapter"):
        save_checkpoint(model, processor, tmp_path, [])
    model.llm.unmerge_adapter()
    save_checkpoint(model, processor, tmp_path, [])


def test_adapters_that_are_merged_for_a_while_are_saved_as_they_were(
    world: World, tmp_path: Path
) -> None:
    model, processor = adapted(world)
    said = logits(model, processor, world)
    model.llm.merge_adapter()
    save_checkpoint(model, processor, tmp_path, [])
    assert torch.equal(logits(AVLLM.from_pretrained(tmp_path), processor, world), said)


def test_merged_for_good_is_the_same_model_without_adapters(world: World, tmp_path: Path) -> None:
    model, processor = adapted(world)
    said = logits(model, processor, world)
    with model.lora(()):
        assert not torch.allclose(logits(model, processor, world), said, atol=1e-3)
    save_checkpoint(model.merge_lora(), processor, tmp_path, [])
    loaded = AVLLM.from_pretrained(tmp_path)
    assert not (tmp_path / "lora").exists()
    assert not any("lora" in name for name in loaded.state_dict())
    assert torch.allclose(logits(loaded, processor, world), said, atol=1e-5)
    with pytest.raises(UserError) as error:
        loaded.merge_lora()
    assert error.value.reason == "nothing_to_merge"
    loaded.add_lora(LoraConfig(r=2))  # a further stage may adapt the merged LLM
    save_checkpoint(loaded, processor, tmp_path, [])
    assert torch.equal(
        logits(AVLLM.from_pretrained(tmp_path), processor, world), logits(loaded, processor, world)
    )


def test_a_checkpoint_that_would_lose_adapters_is_not_written(world: World, tmp_path: Path) -> None:
    model, processor = adapted(world)
    model.llm = model.llm.merge_and_unload()  # PEFT's own way, of which the config knows nothing
    with pytest.raises(CheckpointError, match=r"merge_lora\(\)"):
        save_checkpoint(model, processor, tmp_path, [])
    assert not list(tmp_path.iterdir())


def test_a_quantised_llm_trains_and_merges_no_weights_of_its_own(world: World) -> None:
    pytest.importorskip("bitsandbytes")
    model, _ = adapted(world, quantize="4bit")
    with pytest.raises(UserError) as error:
        model.merge_lora()
    assert error.value.reason == "quantised"
    model.llm.get_input_embeddings().requires_grad_(True)
    with pytest.raises(CheckpointError, match="train LoRA adapters alone"):
        mark_trained(model)


def test_adapters_put_on_by_hand_are_refused_and_never_lost(world: World, tmp_path: Path) -> None:
    import peft

    model, _ = adapted(world)
    peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["proj"]), adapter_name="by_hand"
    )
    with pytest.raises(CheckpointError) as caught:
        model.save_pretrained(str(tmp_path))
    assert caught.value.reason == "foreign_adapter"
    assert not list(tmp_path.iterdir())


def test_a_saved_model_loads_from_any_folder(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = adapted(world)
    said = logits(model, processor, world)
    model.save_pretrained(str(tmp_path / "saved"))
    processor.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    loaded = AVLLM.from_pretrained(".")
    assert torch.equal(logits(loaded, AVProcessor.from_pretrained("."), world), said)
    assert read_manifest_of(".")["backbones"]["llm"]["sha256"]
