"""InstructBLIP's Q-Former, with its words, in ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import make_tokenizer
from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration

from avllm.adapters.base import Prompt
from avllm.adapters.qformer import QFormer
from avllm.errors import UserError
from avllm.tokens import Tokens

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2}
OPTIONS = {"num_queries": 4, "dim": 16, "layers": 2, "heads": 2, "intermediate": 64}
QUESTIONS = ["what colour is it ?", "do you hear a low sound ?"]


@pytest.fixture
def theirs(tmp_path: Path) -> InstructBlipForConditionalGeneration:
    """A checkpoint as transformers saves one, with the Q-Former's tokenizer in its subfolder."""
    tokenizer = make_tokenizer(tmp_path / "qformer_tokenizer")
    config = InstructBlipConfig(
        vision_config={
            "hidden_size": 12,
            "intermediate_size": 24,
            "image_size": 28,
            "patch_size": 14,
            **SIZES,
        },
        qformer_config={
            "hidden_size": 16,
            "intermediate_size": 64,
            "encoder_hidden_size": 12,
            "cross_attention_frequency": 2,
            "vocab_size": len(tokenizer),
            **SIZES,
        },
        text_config={
            "model_type": "opt",
            "hidden_size": 16,
            "ffn_dim": 16,
            "vocab_size": 30,
            "word_embed_proj_dim": 16,
            "max_position_embeddings": 16,
            **SIZES,
        },
        num_query_tokens=4,
    )
    torch.manual_seed(5)
    model = InstructBlipForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path)
    return model


def ours(folder: Path, **changes: object) -> QFormer:
    options = {"init": str(folder), "instruction": str(folder), **OPTIONS, **changes}
    return QFormer({"video": 12}, 24, stream="video", per="frame", **options).eval()


@torch.no_grad()
def test_queries_read_the_question_as_in_instructblip(
    theirs: InstructBlipForConditionalGeneration, tmp_path: Path
) -> None:
    adapter = ours(tmp_path)
    adapter.load_init()
    x = torch.randn(2, 1, 5, 12)
    tokens = Tokens(x, torch.ones(2, 1, 5, dtype=torch.bool), torch.tensor([[[0.0, 1.0]]] * 2))
    asked = torch.ones(2, 3, dtype=torch.bool)
    prompt = Prompt(torch.zeros(2, 3, 24), asked, asked.long(), QUESTIONS)
    seen = adapter({"video": tokens}, prompt)["video"].x[:, 0]
    tokenizer = adapter.instruction._tokenizer[0]
    text = tokenizer(QUESTIONS, return_tensors="pt", padding=True)
    mask = torch.cat([torch.ones(2, 4, dtype=torch.long), text["attention_mask"]], 1)
    expected = theirs.qformer(
        input_ids=text["input_ids"],
        attention_mask=mask,
        query_embeds=theirs.query_tokens.expand(2, -1, -1),
        encoder_hidden_states=x[:, 0],
    ).last_hidden_state[:, :4]
    torch.testing.assert_close(seen, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_without_an_instruction_the_text_layers_are_left(
    theirs: InstructBlipForConditionalGeneration, tmp_path: Path
) -> None:
    adapter = ours(tmp_path, instruction=None)
    adapter.load_init()
    assert torch.equal(adapter.query_tokens, theirs.query_tokens)
    assert torch.equal(adapter.qformer.layernorm.weight, theirs.qformer.embeddings.layernorm.weight)


@pytest.mark.usefixtures("theirs")
def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    other = make_tokenizer(tmp_path / "other")
    other.add_tokens(["<more>"])
    other.save_pretrained(tmp_path / "other")
    adapter = ours(tmp_path, instruction=str(tmp_path / "other"))
    with pytest.raises(UserError, match=r"words\.weight"):
        adapter.load_init()


@pytest.mark.usefixtures("theirs")
def test_heads_that_instructblip_lacks_are_named(tmp_path: Path) -> None:
    adapter = ours(tmp_path, instruction=None, text="llm")
    with pytest.raises(UserError, match="query_projection"):
        adapter.load_init()
