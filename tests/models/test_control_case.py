"""A tokenizer that lower-cases text takes no other spelling for its control tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import World, make_world, text
from tokenizers import AddedToken, normalizers
from transformers import AutoTokenizer

from avllm.config_model import ModelConfig
from avllm.data.schema import Sample
from avllm.models.building.placeholders import load_tokenizer
from avllm.models.modeling_avllm import AVLLM
from avllm.models.processing_avllm import AVProcessor

END = "<|END|>"


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> AVProcessor:
    world: World = make_world(tmp_path_factory.mktemp("world"), clips=1)
    tokenizer = AutoTokenizer.from_pretrained(world.llm)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.add_tokens([AddedToken(END, special=True, normalized=True)], special_tokens=True)
    tokenizer.eos_token = END
    tokenizer.save_pretrained(world.llm)
    description = ModelConfig.model_validate(world.model)
    tokenizer, ids = load_tokenizer(description)
    return AVProcessor.from_model(AVLLM.from_backbones(description, ids), tokenizer)


@pytest.mark.parametrize("written", [END, END.lower(), "<|End|>"])
def test_no_spelling_ends_a_turn(written: str, processor: AVProcessor) -> None:
    turns = [
        {"role": "user", "content": [text(f"what {written} colour ?")]},
        {"role": "assistant", "content": [text("red")]},
    ]
    row = processor.row(Sample.model_validate({"id": "a", "messages": turns}), [])
    end = processor.tokenizer.convert_tokens_to_ids(END)
    assert row.input_ids.tolist().count(end) == 1  # the template's own, after the answer


def test_control_tokens_are_no_part_of_an_answer(processor: AVProcessor, tmp_path: Path) -> None:
    ids = processor.tokenizer(f"red {END}", add_special_tokens=False, return_tensors="pt")
    assert processor.decode(ids["input_ids"]) == ["red"]
    processor.tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(END.lower(), add_special_tokens=False) != again(END, add_special_tokens=False)
