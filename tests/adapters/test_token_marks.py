"""Regions carry a mark in sight and in text, and the marks are drawn in training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import World, make_world, write_rows
from torch import Tensor

from avllm.config_model import ModelConfig
from avllm.data.collate import Batch
from avllm.data.dataset import SampleDataset
from avllm.data.reading import MediaReader
from avllm.data.row import Row
from avllm.data.row_makers.token_marks import DrawnMarks
from avllm.data.schema import RowError, Sample
from avllm.models.building.placeholders import load_tokenizer
from avllm.models.checkpoint import save_checkpoint
from avllm.models.modeling_avllm import AVLLM
from avllm.models.processing_avllm import AVProcessor
from avllm.models.words import load_words
from avllm.objectives.region_guide import later_steps, soft_labels

torch.set_num_threads(1)
NUMBER = 6
BALL = {"id": "ball", "box": [0.0, 0.0, 0.5, 0.5]}  # the upper left 2 x 2 of 4 x 4 patches
DOG = {"id": "dog", "box": [0.5, 0.5, 1.0, 0.625]}  # half of two patches of the third row


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = make_world(tmp_path_factory.mktemp("world"), clips=1)
    Image.new("RGB", (64, 64), "red").save(made.captions.parent / "red.png")
    return made


def composed(world: World, **options: Any) -> tuple[AVLLM, AVProcessor]:
    video, audio = world.model["connector"]
    marks = {"type": "token_marks", "stream": "video", "n": NUMBER, **options}
    description = ModelConfig.model_validate(world.model | {"connector": [video, marks, audio]})
    tokenizer, ids = load_tokenizer(description)
    torch.manual_seed(0)
    model = AVLLM.from_backbones(description, ids, load_words(tokenizer, description)).eval()
    return model, AVProcessor.from_model(model, tokenizer)


@pytest.fixture(scope="module")
def made(world: World) -> tuple[AVLLM, AVProcessor]:
    return composed(world)


def sample(*regions: dict[str, Any], asks: Sequence[str] = ("dog",)) -> Sample:
    picture = {"type": "image", "image": "red.png", "regions": list(regions)}
    words: list[dict[str, Any]] = [{"type": "text", "text": "what colour is "}]
    words += [{"type": "region", "region": name} for name in asks]
    messages = [
        {"role": "user", "content": [picture, *words]},
        {"role": "assistant", "content": "red"},
    ]
    return Sample.model_validate({"id": "s", "messages": messages})


def row_of(
    processor: AVProcessor, given: Sample, world: World, marks: Sequence[int] | None = None
) -> Row:
    clips = MediaReader(processor).inputs(given.media, world.captions.parent)
    return processor.row(given, clips, marks=marks)


def vector(model: AVLLM, mark: int) -> Tensor:
    """The embedding that the LLM reads for a mark's word."""
    word = torch.tensor([model.config.words[f"<mark_{mark}>"]])
    return model.llm.get_input_embeddings()(word)[0]


def added(model: AVLLM, batch: Batch) -> Tensor:
    """What the adapter adds to the visual tokens, ``(B, T, P, D)``."""
    before, after = model.media_steps(batch)[1:3]
    return after["video"].x - before["video"].x


@torch.no_grad()
def test_a_mark_is_only_where_its_box_is_and_the_text_has_the_same_vector(
    made: tuple[AVLLM, AVProcessor], world: World
) -> None:
    model, processor = made
    row = row_of(processor, sample(BALL, DOG), world)
    batch = processor.collate([row])
    grid = added(model, batch)[0, 0].unflatten(0, (4, 4))
    expected = torch.zeros_like(grid)
    expected[:2, :2] = vector(model, 0)
    expected[2, 2:] = 0.5 * vector(model, 1)
    torch.testing.assert_close(grid, expected, atol=1e-6, rtol=0)
    word = model.config.words["<mark_1>"]
    (place,) = (batch.input_ids[0] == word).nonzero().flatten().tolist()
    assert torch.equal(model.embed(batch)[0, place], vector(model, 1))
    assert "dog" not in processor.tokenizer.decode(row.input_ids)


@torch.no_grad()
def test_overlapping_regions_are_averaged(made: tuple[AVLLM, AVProcessor], world: World) -> None:
    model, processor = made
    same = BALL | {"id": "dog"}
    batch = processor.collate([row_of(processor, sample(BALL, same), world)])
    mean = (vector(model, 0) + vector(model, 1)) / 2
    torch.testing.assert_close(added(model, batch)[0, 0, 0], mean)


@torch.no_grad()
def test_other_marks_change_nothing_else(made: tuple[AVLLM, AVProcessor], world: World) -> None:
    model, processor = made
    given = sample(BALL, DOG, asks=("dog", "ball"))
    plain = row_of(processor, given, world)
    drawn = row_of(processor, given, world, marks=[4, 2])
    renamed = {f"<mark_{old}>": f"<mark_{new}>" for old, new in ((0, 4), (1, 2))}
    ids = {model.config.words[old]: model.config.words[new] for old, new in renamed.items()}
    assert [ids.get(i, i) for i in plain.input_ids.tolist()] == drawn.input_ids.tolist()
    rest = added(model, processor.collate([drawn]))[0, 0].unflatten(0, (4, 4))
    torch.testing.assert_close(rest[0, 0], vector(model, 4), atol=1e-6, rtol=0)
    torch.testing.assert_close(rest[2, 3], 0.5 * vector(model, 2), atol=1e-6, rtol=0)
    assert model.words is not None
    before = model.embed(processor.collate([plain]))
    saved = model.words.input.weight.clone()
    for old, new in ids.items():  # with the vectors exchanged as the ids are, the input is the same
        rows = model.words.rows_of(torch.tensor([old, new]))
        model.words.input.weight[rows[1]] = saved[rows[0]]
    after = model.embed(processor.collate([drawn]))
    model.words.input.weight.copy_(saved)
    torch.testing.assert_close(before, after)


def test_marks_are_drawn_in_training_and_in_order_elsewhere(
    made: tuple[AVLLM, AVProcessor], world: World
) -> None:
    _, processor = made
    rows = [sample(BALL, DOG, asks=("dog", "ball")).model_dump(mode="json")]
    manifest = write_rows(world.captions.with_name("marks.jsonl"), rows)
    dataset = SampleDataset([str(manifest)], processor, maker=DrawnMarks(n=NUMBER))
    (in_order,) = dataset[0].rows
    (again,) = dataset[0].rows
    assert torch.equal(in_order.input_ids, again.input_ids)
    seen = set()
    for drawn in range(20):
        (row,) = dataset[0, drawn].rows
        (same,) = dataset[0, drawn].rows
        assert torch.equal(row.input_ids, same.input_ids)  # a resumed run draws the same
        ids = row.input_ids.tolist()
        words = [n for n in range(NUMBER) if processor.config.words[f"<mark_{n}>"] in ids]
        seen |= set(words)
        extra = row.clips[0]["video"].extra
        marks = extra.get("region_marks", torch.tensor([[1, 2]]))[0].tolist()
        assert sorted(marks) == [word + 1 for word in words]
    assert seen == set(range(NUMBER))


@torch.no_grad()
def test_a_row_of_two_pictures_keeps_its_marks_when_it_is_remembered(
    made: tuple[AVLLM, AVProcessor], world: World
) -> None:
    model, processor = made
    row = sample(BALL, asks=("ball",)).model_dump(mode="json") | {"id": "two"}
    first = row["messages"][0]["content"][0]
    row["messages"][0]["content"][1:] = [{**first, "regions": [DOG]}, {"type": "text", "text": "?"}]
    manifest = write_rows(world.captions.with_name("two.jsonl"), [row])
    dataset = SampleDataset([str(manifest)], processor)
    for _ in range(2):
        (made_row,) = dataset[0].rows
        marked = added(model, processor.collate([made_row]))
        torch.testing.assert_close(marked[0, 0, 0], vector(model, 0), atol=1e-6, rtol=0)
        torch.testing.assert_close(marked[1, 0, 11], vector(model, 1) / 2, atol=1e-6, rtol=0)


@pytest.fixture
def video(world: World) -> dict[str, Any]:
    return {"type": "video", "video": "000.mp4", "sound": "off"}


def moving(video: dict[str, Any]) -> Sample:
    boxes = [BALL | {"time": 0.0}, BALL | {"time": 1.0, "box": [0.5, 0.0, 1.0, 0.5]}]
    given = sample(*boxes, asks=("ball",)).model_dump(mode="json")
    given["messages"][0]["content"][0] = {**video, "regions": boxes}
    return Sample.model_validate(given)


@torch.no_grad()
def test_a_region_that_moves_has_one_mark_and_the_first_step_may_have_it_alone(
    world: World, video: dict[str, Any]
) -> None:
    for steps in ("all", "first"):
        model, processor = composed(world, steps=steps)
        row = row_of(processor, moving(video), world)
        marked = added(model, processor.collate([row]))[0].unflatten(1, (4, 4)).abs().sum(-1) > 0
        expected = torch.zeros(2, 4, 4, dtype=torch.bool)
        expected[0, :2, :2] = True
        expected[1, :2, 2:] = steps == "all"
        assert torch.equal(marked, expected)


def test_soft_labels_of_later_frames_by_hand(
    made: tuple[AVLLM, AVProcessor], world: World, video: dict[str, Any]
) -> None:
    _, processor = made
    row = row_of(processor, moving(video), world)
    extra = processor.collate([row]).streams["video"].extra
    assert later_steps(extra).tolist() == [[False, True]]
    labels = soft_labels(extra, 16, NUMBER)[0, 1].unflatten(0, (4, 4))  # (4, 4, n + 1)
    assert torch.equal(labels.sum(-1), torch.ones(4, 4))
    covered = torch.zeros(4, 4)
    covered[:2, 2:] = 1
    assert torch.equal(labels[..., 0], covered)
    assert torch.equal(labels[..., NUMBER], 1 - covered)


def test_what_cannot_be_marked_is_named(made: tuple[AVLLM, AVProcessor], world: World) -> None:
    _, processor = made
    many = [BALL | {"id": f"ball{number}"} for number in range(NUMBER + 1)]
    with pytest.raises(RowError) as caught:
        row_of(processor, sample(*many, asks=("ball0",)), world)
    assert caught.value.reason == "too_many_regions"
    spoken = sample(BALL, asks=("ball",)).model_dump(mode="json")
    spoken["messages"][0]["content"][1]["text"] = "what is <mark_3> ?"
    with pytest.raises(RowError) as caught:
        row_of(processor, Sample.model_validate(spoken), world)
    assert caught.value.reason == "reserved_text"
    with pytest.raises(ValueError, match="taken in this row"):
        sample(BALL, BALL | {"time": 1.0}, asks=("ball",))


@torch.no_grad()
def test_a_checkpoint_brings_its_marks_back(
    made: tuple[AVLLM, AVProcessor], world: World, tmp_path: Path
) -> None:
    model, processor = made
    save_checkpoint(model, processor, tmp_path / "saved", [])
    again = AVLLM.from_pretrained(str(tmp_path / "saved")).eval()
    reader = AVProcessor.from_pretrained(tmp_path / "saved")
    given = sample(BALL, DOG, asks=("dog", "ball"))
    row, other = row_of(processor, given, world), row_of(reader, given, world)
    assert torch.equal(row.input_ids, other.input_ids)
    assert torch.equal(model.embed(processor.collate([row])), again.embed(reader.collate([other])))
