"""An HF text encoder as text side: it is read, it never trains, and no checkpoint holds it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny import make_tokenizer, make_world, settings
from tiny_runs import losses, together, train

from avllm.evaluation.retrieval import retrieval
from avllm.objectives._text import TextSide, load_text_encoder


def make_bert(folder: Path) -> Path:
    """A two-layer BERT of width 24 with random weights, and its tokenizer."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(1)
    sizes = {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    vocabulary = len(make_tokenizer(folder))
    BertModel(
        BertConfig(vocab_size=vocabulary, max_position_embeddings=16, **sizes)
    ).save_pretrained(folder)
    return folder


class Width:
    """What the text side reads of a model: the width of its LLM."""

    def __init__(self) -> None:
        self.llm = self
        self.embedding_dim = 8

    def get_input_embeddings(self) -> Width:
        return self


def test_a_text_is_the_mean_of_its_own_tokens_whatever_it_is_padded_with(tmp_path: Path) -> None:
    side = TextSide(Width(), str(make_bert(tmp_path / "bert"))).train()
    encoder, tokenizer = side._frozen[0], side.tokenizer
    cpu = torch.device("cpu")
    short, _ = side._by_encoder(["red", "what colour is it ?"], cpu)
    with torch.no_grad():
        alone = encoder(**tokenizer("red", return_tensors="pt")).last_hidden_state.mean(1)[0]
    torch.testing.assert_close(short, alone, rtol=0, atol=1e-6)
    assert not encoder.training
    assert side.dim == 24
    assert side._by_encoder(["red " * 99], cpu).shape == (
        1,
        24,
    )  # longer than its positions: its beginning


def test_the_text_side_of_two_sided_models(tmp_path: Path) -> None:
    from transformers import (
        CLIPConfig,
        CLIPModel,
        CLIPVisionConfig,
        CLIPVisionModel,
        T5Config,
        T5Model,
    )

    small = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    CLIPModel(
        CLIPConfig(text_config={**small, "vocab_size": 99}, vision_config=small)
    ).save_pretrained(tmp_path / "c")
    T5Model(
        T5Config(d_model=20, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=99)
    ).save_pretrained(tmp_path / "t")
    CLIPVisionModel(CLIPVisionConfig(**small)).save_pretrained(tmp_path / "v")
    ids = torch.tensor([[3, 4, 5]])
    for name, width in (("c", 16), ("t", 20)):
        encoder, found = load_text_encoder(str(tmp_path / name))
        assert found == width
        assert encoder(input_ids=ids).last_hidden_state.shape == (1, 3, width)
    with pytest.raises(ValueError, match="reads no text"):
        load_text_encoder(str(tmp_path / "v"))


def test_a_stage_aligns_with_a_text_encoder_that_stays_as_it_is(tmp_path: Path) -> None:
    world, bert = make_world(tmp_path / "world", clips=6), make_bert(tmp_path / "bert")
    objective = [{"type": "contrastive", "dim": 16, "text": str(bert)}]
    # ^objectives is the rule of the shipped presets: it must not reach the encoder
    asked = settings(world, tmp_path / "run", "align", objectives=objective, train__batch_size=6)
    together(train, asked, ranks=1)
    found = losses(tmp_path / "run")
    assert all(torch.tensor(found).isfinite())
    assert found[0] != found[-1]
    with safe_open(tmp_path / "run" / "objectives.safetensors", "pt") as file:
        names = set(file.keys())
    assert "contrastive.text_projection.weight" in names
    assert not [n for n in names if ".text." in n]
    assert retrieval(tmp_path / "run", world.captions)["n"] > 1
