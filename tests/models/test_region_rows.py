"""Regions from a row to the tokens of its picture: boxes beside it, references as text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import World, make_world

from avllm.config_model import ModelConfig
from avllm.data.reading import MediaReader
from avllm.data.schema import RowError, Sample
from avllm.encoders._visual import VisualPreprocessor
from avllm.models.building.placeholders import load_tokenizer
from avllm.models.modeling_avllm import AVLLM
from avllm.models.processing_avllm import AVProcessor

torch.set_num_threads(1)
BALL = {"id": "ball", "box": [0.25, 0.0, 0.75, 0.5]}
DOG = {"id": "dog", "box": [0.0, 0.5, 0.1, 1.0]}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = make_world(tmp_path_factory.mktemp("world"), clips=1)
    Image.new("RGB", (200, 100), "red").save(made.captions.parent / "wide.png")
    return made


def sample(*regions: dict[str, Any], answer: str = "red") -> Sample:
    picture = {"type": "image", "image": "wide.png", "regions": list(regions)}
    words = [{"type": "text", "text": "what colour is "}, {"type": "region", "region": "ball"}]
    messages = [
        {"role": "user", "content": [picture, *words]},
        {"role": "assistant", "content": answer},
    ]
    return Sample.model_validate({"id": "s", "messages": messages})


def composed(world: World) -> tuple[AVLLM, AVProcessor]:
    description = ModelConfig.model_validate(world.model)
    tokenizer, ids = load_tokenizer(description)
    model = AVLLM.from_backbones(description, ids).eval()
    return model, AVProcessor.from_model(model, tokenizer)


def test_boxes_reach_the_tokens_and_references_the_text(world: World) -> None:
    model, processor = composed(world)
    given = sample(BALL, DOG)
    batch = processor([given], root=world.captions.parent, answer=True)
    tokens = model.encode_media(batch.streams)["video"]
    assert tokens.extra["region_boxes"].tolist() == [
        [[[8, 0, 24, 16], [0, 16, pytest.approx(3.2), 32]]]
    ]
    assert tokens.extra["picture_size"].tolist() == [[[32, 32]]]
    assert model.media_tokens(batch)["video"].extra["region_mask"].tolist() == [[[True, True]]]
    assert given.messages[0].text == "what colour is <region ball>"
    assert "<region ball>" in str(processor.apply_chat_template(given.messages))


def test_a_region_that_is_cropped_away_is_named(world: World) -> None:
    _, processor = composed(world)
    processor.preprocessors["video"] = VisualPreprocessor((32, 32), 16, shortest=32)
    assert MediaReader(processor).inputs(sample(BALL).media, world.captions.parent)
    with pytest.raises(RowError, match="'dog'") as error:
        MediaReader(processor).inputs(sample(BALL, DOG).media, world.captions.parent)
    assert error.value.reason == "region_cropped"


@pytest.mark.parametrize(
    ("regions", "expected"),
    [
        ([], "messages.0.content.2.region"),
        ([DOG], "messages.0.content.2.region"),
        ([BALL, BALL], "'ball'"),
        ([BALL | {"box": [0.5, 0, 0.5, 1]}], "box"),
        ([BALL | {"box": [0, 0, 32, 32]}], "box"),
        ([BALL | {"colour": "red"}], "colour"),
    ],
)
def test_a_wrong_region_is_refused(regions: list[dict[str, Any]], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        sample(*regions)


def test_regions_survive_a_manifest(tmp_path: Path) -> None:
    from avllm.data.manifest import read_manifest, write_manifest

    write_manifest(tmp_path / "m.jsonl", [sample(BALL, DOG)])
    (row,) = read_manifest(tmp_path / "m.jsonl")
    assert row == sample(BALL, DOG)
    assert hash(row.media[0]) == hash(sample(BALL, DOG).media[0])
