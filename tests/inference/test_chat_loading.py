"""Chats on checkpoints with LoRA and with a quantised LLM: the trained weights answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from avllm.config_peft import LoraConfig
from avllm.errors import UserError
from avllm.inference.chat import Chat
from avllm.models.checkpoint import save_checkpoint

QUESTION = "what colour is it ?"


def with_lora(chat: Chat, folder: Path) -> Path:
    """The chat's model with LoRA adapters that change its answers, saved."""
    chat.model.add_lora(LoraConfig(r=4, alpha=8))
    torch.manual_seed(5)
    for name, parameter in chat.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.4)
    save_checkpoint(chat.model.eval(), chat.processor, folder, [])
    return folder


def ask(chat: Chat, **media: Any) -> str:
    chat.clear()
    return "".join(chat.ask(QUESTION, max_new_tokens=16, **media))


def test_lora_answers_as_it_did_before_it_was_saved(
    checkpoint: Path, clips: list[Path], tmp_path: Path
) -> None:
    chat = Chat.load(checkpoint)
    bare = ask(chat, video=clips[0])
    folder = with_lora(chat, tmp_path / "lora")
    before = ask(chat, video=clips[0])
    assert before != bare
    loaded = Chat.load(folder)
    assert ask(loaded, video=clips[0]) == before
    assert "".join(loaded.ask("and do you hear it ?", max_new_tokens=8))  # a second turn


@pytest.mark.parametrize("lora", [False, True])
def test_a_4bit_llm_answers_the_same_each_time(
    checkpoint: Path, clips: list[Path], tmp_path: Path, lora: bool
) -> None:
    layers = pytest.importorskip("bitsandbytes").nn
    folder = with_lora(Chat.load(checkpoint), tmp_path / "lora") if lora else checkpoint
    chat = Chat.load(folder, quantize="4bit")
    packed = [m for m in chat.model.modules() if isinstance(m, layers.Linear4bit)]
    assert packed
    assert not any(
        m.support_avx512bf16_for_cpu for m in packed
    )  # else the first answer repacks the weights for good
    weights = [m.weight.data.clone() for m in packed]
    first = ask(chat, video=clips[0])
    assert first
    assert [ask(chat, video=clips[0]) for _ in range(2)] == [first] * 2
    assert all(torch.equal(m.weight.data, w) for m, w in zip(packed, weights, strict=True))
    assert ask(chat, video=clips[1]) != first  # it still sees


@pytest.mark.parametrize("device", ["tpu", "xpu:7"])
def test_a_device_that_is_not_here_is_named_before_anything_is_read(
    tmp_path: Path, device: str
) -> None:
    with pytest.raises(UserError, match=device) as error:
        Chat.load(tmp_path, device=device)
    assert error.value.reason == "device"
