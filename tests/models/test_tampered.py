"""Tampered checkpoints run no code, give no other answers, and end in one line within seconds."""

from __future__ import annotations

import sys
import time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import World, make_world

from avllm.config_model import ModelConfig
from avllm.config_peft import LoraConfig
from avllm.data.schema import Sample
from avllm.errors import UserError
from avllm.models.building.placeholders import load_tokenizer
from avllm.models.checkpoint import save_checkpoint
from avllm.models.modeling_avllm import AVLLM
from avllm.models.processing_avllm import AVProcessor
from avllm.models.rows import template

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "tamper.py"
MOST_SECONDS = 20.0  # of one load on a busy machine; a good one takes 0.2


def script() -> Any:
    spec = spec_from_file_location("tamper", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), clips=1)


@pytest.fixture(scope="module")
def good(world: World) -> Path:
    """A checkpoint with LoRA, whose answers depend on all of its weights."""
    description = ModelConfig.model_validate(world.model)
    tokenizer, ids = load_tokenizer(description)
    torch.manual_seed(1)
    model = AVLLM.from_backbones(description, ids).add_lora(LoraConfig(r=2, alpha=4)).freeze()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    save_checkpoint(model.eval(), AVProcessor.from_model(model, tokenizer), world.root / "good", [])
    return world.root / "good"


def answer(folder: Path, world: World) -> torch.Tensor:
    """Load a checkpoint as every command does; return the logits of a question about a clip."""
    model, processor = AVLLM.from_pretrained(folder), AVProcessor.from_pretrained(folder)
    clip = {"type": "video", "video": str(world.captions.parent / "000.mp4")}
    text = {"type": "text", "text": "what colour is it ?"}
    sample = Sample.model_validate(
        {"id": "s", "messages": [{"role": "user", "content": [clip, text]}]}
    )
    with torch.no_grad():
        return model(processor([sample])).logits


def test_tampered_checkpoints(
    good: Path, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template, "SECONDS", 1.0)
    expected = answer(good, world)
    wrong = []
    count = 0
    for title, folder in script().tampered(good, tmp_path):
        count += 1
        monkeypatch.syspath_prepend(str(folder.parent))
        monkeypatch.chdir(folder.parent)
        began = time.monotonic()
        try:
            same = torch.equal(answer(folder, world), expected)
            outcome = "" if same else "another answer in silence"
        except UserError as error:
            outcome = "" if "\n" not in str(error) else f"several lines: {error}"
        except Exception as error:  # noqa: BLE001 (a traceback of any class is what this test looks for)
            outcome = f"{type(error).__name__}: {error}"
        if time.monotonic() - began > MOST_SECONDS:
            outcome += " too slow"
        if any(folder.parent.rglob("ran")) or "planted_by_tamper" in sys.modules:
            outcome += " ran code"
        if outcome:
            wrong.append(f"{title}: {outcome}")
    assert count >= 40
    assert not wrong, "\n".join(wrong)
