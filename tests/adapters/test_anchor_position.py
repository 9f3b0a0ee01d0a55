"""Tokens carry the rows of the words for their time and place, which train through them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import World, make_world
from torch import Tensor

from avllm.adapters.anchor_position import AnchorPosition, interpolate, spread_gradient
from avllm.config_model import ModelConfig
from avllm.errors import UserError
from avllm.models.building.placeholders import load_tokenizer
from avllm.models.modeling_avllm import AVLLM
from avllm.models.processing_avllm import AVProcessor
from avllm.models.words import load_words
from avllm.tokens import Tokens

torch.set_num_threads(1)
NUMBER = 5


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), clips=1)


def composed(world: World, codec: str = "anchors", **options: Any) -> tuple[AVLLM, AnchorPosition]:
    mark = {"type": "anchor_position", "stream": "video", **options}
    video, audio = world.model["connector"]
    parts = {"connector": [video, mark, audio]}
    if codec == "anchors":
        parts["time_codec"] = {"type": "anchors", "number": NUMBER}
    description = ModelConfig.model_validate(world.model | parts)
    tokenizer, ids = load_tokenizer(description)
    torch.manual_seed(0)
    model = AVLLM.from_backbones(description, ids, load_words(tokenizer, description)).eval()
    adapter = model.connector[1]
    assert isinstance(adapter, AnchorPosition)
    return model, adapter


def rows(model: AVLLM, word: str, number: int) -> Tensor:
    """The mean of input and output row of each word, by the functions that the LLM calls."""
    ids = torch.tensor([model.config.words[word.format(index)] for index in range(number)])
    read = model.llm.get_input_embeddings()(ids)  # (n, D)
    probe = torch.eye(read.shape[1])
    written = model.llm.get_output_embeddings()(probe)[:, ids].T  # (n, D)
    return (read + written) / 2


def clip(steps: int, tokens: int, width: int = 32) -> Tokens:
    """A clip of moments, evenly spaced: the first at its start, the last at its end."""
    moments = torch.linspace(0, 8, steps)
    x = torch.randn(1, steps, tokens, width, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, steps, tokens, dtype=torch.bool)
    return Tokens(x, mask, torch.stack([moments, moments], -1)[None])


@torch.no_grad()
def test_steps_at_anchors_get_exactly_their_rows_and_others_a_mixture(world: World) -> None:
    model, adapter = composed(world)
    table = rows(model, "<time_{}>", NUMBER)
    at_anchors = clip(NUMBER, 4)
    added = adapter.adapt(at_anchors).x - at_anchors.x
    for step in range(NUMBER):
        torch.testing.assert_close(added[0, step], table[step].expand(4, -1))
    between = clip(2 * NUMBER - 1, 4)
    halfway = (adapter.adapt(between).x - between.x)[0, 1, 0]
    torch.testing.assert_close(halfway, (table[0] + table[1]) / 2)


@torch.no_grad()
def test_patches_get_the_rows_of_their_place(world: World) -> None:
    model, adapter = composed(world, width=4, height=2)
    over, down = rows(model, "<width_{}>", 4), rows(model, "<height_{}>", 2)
    tokens = clip(1, 16)  # a picture of 4 x 4 patches
    time = interpolate(rows(model, "<time_{}>", NUMBER), torch.zeros(1))[0]
    added = (adapter.adapt(tokens).x - tokens.x)[0, 0].unflatten(0, (4, 4)) - time
    for row in range(4):
        for column in range(4):
            place = (column + 0.5) / 4 * 3
            low = min(int(place), 2)
            expected = over[low] * (low + 1 - place) + over[low + 1] * (place - low)
            share = (row + 0.5) / 4
            expected = expected + down[0] * (1 - share) + down[1] * share
            torch.testing.assert_close(added[row, column], expected, atol=1e-5, rtol=0)
    with pytest.raises(UserError) as caught:
        adapter.adapt(clip(1, 3))
    assert caught.value.reason == "no_grid"


def test_gradients_reach_the_words_and_with_neighbours_those_beside_them(world: World) -> None:
    reached = {}
    for neighbours in (False, True):
        model, adapter = composed(world, neighbours=neighbours)
        assert model.words is not None
        made = adapter.adapt(clip(NUMBER, 1))
        made.x[0, 2].sum().backward()
        for table in (model.words.input.weight, model.words.output.weight):
            assert table.grad is not None
            reached[neighbours] = table.grad[:, 0]
            expected = [0.25, 0.5, 1, 0.5, 0.25] if neighbours else [0, 0, 1, 0, 0]
            torch.testing.assert_close(table.grad[:, 0], torch.tensor(expected) / 2)
        assert not list(adapter.parameters())


def test_spreading_changes_no_value() -> None:
    table = torch.randn(7, 3, requires_grad=True)
    assert torch.equal(spread_gradient(table), table)


def test_a_media_run_is_marked_in_the_model(world: World) -> None:
    model, _ = composed(world)
    plain, _ = composed(world)
    plain.connector[1]._model = None  # as before it is bound: nothing is added
    processor = AVProcessor.from_model(model, load_tokenizer_of(world))
    question = {"role": "user", "content": [{"type": "video", "video": "000.mp4"}]}
    batch = processor([{"id": "a", "messages": [question]}], world.captions.parent)
    with torch.no_grad():
        difference = model.media_tokens(batch)["video"].x - plain.media_tokens(batch)["video"].x
    assert difference.abs().amax() > 0


def load_tokenizer_of(world: World) -> Any:
    parts = {"time_codec": {"type": "anchors", "number": NUMBER}}
    return load_tokenizer(ModelConfig.model_validate(world.model | parts))[0]


def test_what_it_needs_is_named(world: World) -> None:
    with pytest.raises(ValueError, match="time codec"):
        composed(world, "seconds")
    with pytest.raises(ValueError, match="width 1"):
        composed(world, width=1)
