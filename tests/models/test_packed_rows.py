"""Unrelated rows in one sequence: loss and gradients are those of the rows by themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from avllm.config_peft import LoraConfig
from avllm.data.collate import Batch, collate
from avllm.data.packing import fill_sequences, share_media
from avllm.data.row import IGNORE, Row
from avllm.models.attention import PackingError, check_packing
from avllm.models.configuration_avllm import AVConfig
from avllm.models.modeling_avllm import AVLLM
from avllm.objectives.next_token import NextToken
from avllm.tokens import EncoderInput

VOCAB, WIDTH = 64, 8
LENGTHS = (20, 33, 47, 25, 21)
LLMS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama eager": {"attn_implementation": "eager"},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16},
    "gemma3_text": {
        "head_dim": 16,
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "mistral": {"sliding_window": 9},
}


def build(name: str) -> AVLLM:
    """A tiny model of two streams whose LLM is of the named kind."""
    torch.manual_seed(0)
    kind, changes = name.split()[0], LLMS.get(name, {})
    llm = {
        "model_type": kind,
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
    }
    llm |= {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3, **changes}
    small = {
        "num_attention_heads": 2,
        "hidden_size": WIDTH,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
    }
    eye = {"model_type": "siglip_vision_model", "image_size": 8, "patch_size": 8, **small}
    ear = {
        "model_type": "whisper",
        "d_model": WIDTH,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
    }
    config = AVConfig(
        llm={"config": llm},
        encoders={
            "video": {"type": "siglip", "config": eye, "options": {}},
            "audio": {"type": "whisper", "config": ear, "options": {}},
        },
        connector=[{"type": "mlp", "stream": "video"}, {"type": "linear", "stream": "audio"}],
        layout={"type": "concat"},
        media_token_ids={"video": VOCAB, "audio": VOCAB + 1},
    )
    return AVLLM(config).freeze()


def clip(steps: int) -> dict[str, EncoderInput]:
    """Features of both streams, one token a step."""
    mask, span = torch.ones(steps, 1, dtype=torch.bool), torch.zeros(steps, 2)
    return {
        s: EncoderInput({}, span, mask, {"": torch.randn(steps, 1, WIDTH)})
        for s in ("video", "audio")
    }


def make_row(number: int, length: int, media: dict[str, EncoderInput] | None = None) -> Row:
    """Text, perhaps a run of media, more text; targets over the last third (and one at 0)."""
    steps = len(media["video"].span) if media else 0
    run = torch.tensor([VOCAB] * steps + [VOCAB + 1] * steps, dtype=torch.long)
    words = torch.randint(3, VOCAB, (length - len(run),))
    ids = torch.cat([words[:4], run, words[4:]])
    labels = torch.where((torch.arange(length) >= 2 * length // 3) & (ids < VOCAB), ids, IGNORE)
    labels[0] = ids[0]
    return Row(f"row {number}", ids, labels, [media] if media else [], ids >= VOCAB)


def rows() -> list[Row]:
    """Rows with and without media, of several lengths."""
    torch.manual_seed(1)
    return [
        make_row(n, length, clip(2 + n) if n != 2 else None) for n, length in enumerate(LENGTHS)
    ]


def loss_and_gradients(model: AVLLM, batch: Batch) -> tuple[Tensor, int, dict[str, Tensor]]:
    """The mean loss, the number of targets, and the gradient of everything that trains."""
    model.zero_grad()
    loss, _ = NextToken(model)(model, batch)
    (loss / batch.num_targets).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach() / batch.num_targets, batch.num_targets, found


def assert_same(model: AVLLM, apart: Batch, packed: Batch) -> None:
    """Loss and gradients agree to 1e-5 of the largest number in each tensor."""
    (loss, count, grads), (packed_loss, packed_count, packed_grads) = (
        loss_and_gradients(model, batch) for batch in (apart, packed)
    )
    assert count == packed_count
    torch.testing.assert_close(packed_loss, loss, rtol=1e-5, atol=1e-5)
    assert grads.keys() == packed_grads.keys()
    assert any(float(g.abs().max()) > 1e-3 for g in grads.values())
    for name, grad in grads.items():
        assert float((packed_grads[name] - grad).abs().max()) <= 1e-5 * max(
            1.0, float(grad.abs().max())
        ), name


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", LLMS)
def test_filled_sequences_give_the_rows_loss_and_gradients(name: str, lora: bool) -> None:
    model = build(name)
    if lora:
        model.add_lora(LoraConfig(r=2)).freeze()
        for key, p in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(p, std=0.1)
    model.train()
    check_packing(model)
    filled = fill_sequences(rows(), 80)
    assert len(filled) == 2
    assert_same(model, collate(rows(), pad_id=0), collate(filled, pad_id=0))


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text"])
def test_questions_about_one_clip_and_other_rows_share_sequences(name: str) -> None:
    model, media = build(name), clip(5)
    torch.manual_seed(2)
    start = make_row(0, 24, media)
    asked = []
    for number in range(3):
        words = torch.randint(3, VOCAB, (6 + number,))
        ids = torch.cat([start.input_ids, words])
        labels = torch.full_like(ids, IGNORE)
        labels[-4:] = ids[-4:]
        asked.append(Row(f"q{number}", ids, labels, [media], ids >= VOCAB))
    (packed,) = share_media(asked, 200)
    filled = fill_sequences([*rows(), packed], 200)
    assert len(filled) == 1
    assert_same(model, collate([*rows(), *asked], pad_id=0), collate(filled, pad_id=0))


def test_what_cannot_be_packed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    monkeypatch.setattr(model.connector[0], "conditioned", True, raising=False)
    with pytest.raises(PackingError) as error:
        check_packing(model)
    assert error.value.reason == "conditioned"
    monkeypatch.undo()
    monkeypatch.setattr(model.llm.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(PackingError, match="flash_attention_2.*sdpa, eager") as error:
        check_packing(model)
    assert error.value.reason == "attention"


def test_layers_that_look_over_the_borders_are_found() -> None:
    with pytest.raises(PackingError, match="linear_attention") as error:
        check_packing(build("qwen3_next"))
    assert error.value.reason == "layer_kind"
    with pytest.raises(PackingError) as error:
        check_packing(build("rwkv"))
    assert error.value.reason == "sees_other_rows"
    with pytest.raises(PackingError) as error:
        check_packing(build("bloom"))
    assert error.value.reason == "no_mask"
