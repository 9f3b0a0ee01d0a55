"""Check that an adapter may read another part of its model, and that it registers nothing of it."""

from __future__ import annotations

import sys
import types
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import World, make_world
from torch import Tensor

from avllm.adapters.base import Prompt, StreamAdapter
from avllm.config_model import ModelConfig
from avllm.models.building.placeholders import load_tokenizer
from avllm.models.checkpoint import save_checkpoint
from avllm.models.modeling_avllm import AVLLM
from avllm.models.processing_avllm import AVProcessor
from avllm.tokens import Tokens


class NearestWord(StreamAdapter):
    """Replace each token by the LLM's most similar embedding: reads the table each time."""

    def __init__(self, widths: dict[str, int], llm_dim: int, *, stream: str) -> None:
        super().__init__(widths, llm_dim, stream)
        self.bound = 0

    def bind(self, model: Any) -> None:
        self.bound += 1
        self.model = weakref.ref(model)

    def adapt(self, tokens: Tokens, prompt: Prompt | None = None) -> Tokens:
        table: Tensor = self.model().llm.get_input_embeddings().weight
        return tokens.with_x(table[(tokens.x @ table.T).argmax(-1)])


class Greedy(NearestWord):
    """Keep the LLM itself, which registers its parameters a second time."""

    def bind(self, model: Any) -> None:
        self.llm = model.llm


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("bound"), clips=2)


@pytest.fixture(autouse=True)
def module(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = types.ModuleType("bound_parts")
    parts.NearestWord, parts.Greedy = NearestWord, Greedy  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bound_parts", parts)


def compose(world: World, name: str) -> tuple[AVLLM, Any]:
    connector = [*world.model["connector"], {"type": f"bound_parts:{name}", "stream": "video"}]
    description = ModelConfig.model_validate(world.model | {"connector": connector})
    tokenizer, ids = load_tokenizer(description)
    return AVLLM.from_backbones(description, ids).eval(), tokenizer


def test_it_is_bound_once_and_reads_the_table(world: World, tmp_path: Path) -> None:
    model, tokenizer = compose(world, "NearestWord")
    processor = AVProcessor.from_model(model, tokenizer)
    save_checkpoint(model, processor, tmp_path / "saved", [])
    again = AVLLM.from_pretrained(str(tmp_path / "saved"), allow_parts=["bound_parts:NearestWord"])
    for each in (model, again):
        adapter = each.connector[-1]
        assert adapter.bound == 1
        assert adapter.model() is each
        assert not adapter.state_dict()
        table = each.llm.get_input_embeddings().weight
        x = table[torch.tensor([[[3, 5]]])] * 4
        mask, span = torch.ones(1, 1, 2, dtype=torch.bool), torch.zeros(1, 1, 2)
        made = adapter.adapt(Tokens(x, mask, span)).x
        assert (made[0, 0][:, None] == table).all(-1).any(-1).all()


def test_a_second_registration_is_refused(world: World) -> None:
    with pytest.raises(TypeError, match=r"llm\."):
        compose(world, "Greedy")
