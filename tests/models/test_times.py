"""Times in questions and answers: written by the model's codec, and read back as seconds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import World, make_world

from avllm.config_model import ModelConfig
from avllm.data.reading import MediaReader
from avllm.data.schema import RowError, Sample
from avllm.errors import UserError
from avllm.models.building.placeholders import load_tokenizer
from avllm.models.checkpoint import save_checkpoint
from avllm.models.modeling_avllm import AVLLM
from avllm.models.processing_avllm import AVProcessor
from avllm.models.words import load_words
from avllm.objectives.next_token import NextToken

ANCHORS = {"type": "time_codecs.own_codecs:Anchors"}
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), clips=2)


def composed(world: World, codec: dict[str, Any] | None = None) -> tuple[AVLLM, AVProcessor]:
    description = ModelConfig.model_validate(world.model | ({"time_codec": codec} if codec else {}))
    tokenizer, ids = load_tokenizer(description)
    torch.manual_seed(0)
    model = AVLLM.from_backbones(description, ids, load_words(tokenizer, description)).eval()
    return model, AVProcessor.from_model(model, tokenizer)


def sample(*answer: dict[str, Any], question: tuple[dict[str, Any], ...] = ()) -> Sample:
    video = {"type": "video", "video": "000.mp4"}
    content = [video, *(question or ({"type": "text", "text": "what is it ?"},))]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": list(answer)},
    ]
    return Sample.model_validate({"id": "s", "messages": messages})


def at(seconds: float, **more: Any) -> dict[str, Any]:
    return {"type": "time", "seconds": seconds, **more}


def span(start: float, end: float) -> dict[str, Any]:
    return {"type": "time", "start": start, "end": end}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def rendered(processor: AVProcessor, given: Sample, world: World) -> str:
    clips = MediaReader(processor).inputs(given.media, world.captions.parent)
    return processor.tokenizer.decode(processor.row(given, clips).input_ids)


def test_a_turns_text_says_seconds() -> None:
    row = sample(text("from "), span(1.5, 3.0), text(" and at "), at(0.25))
    assert row.answer == "from 1.5 s to 3.0 s and at 0.2 s"
    assert row.messages[0].text == "what is it ?"


def test_seconds_are_the_default_and_change_no_other_row(world: World) -> None:
    _, processor = composed(world)
    plain, timed = sample(text("red 0.5 s")), sample(text("red "), at(0.5))
    clips = MediaReader(processor).inputs(plain.media, world.captions.parent)
    assert (
        processor.row(timed, clips).input_ids.tolist()
        == processor.row(plain, clips).input_ids.tolist()
    )
    assert clips[0]["video"].duration == pytest.approx(1.0, abs=0.1)


def test_a_codec_gets_the_clips_duration(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    _, processor = composed(world, {"type": "percent"})
    given = sample(text("yes "), at(0.5), question=(text("what is there at "), at(0.25)))
    clips = MediaReader(processor).inputs(given.media, world.captions.parent)
    duration = clips[0]["video"].duration
    assert duration is not None
    written = processor.content.write(given.messages, [duration])
    expected = [f"{round(100 * second / duration):02d}%" for second in (0.25, 0.5)]
    assert [message.text for message in written.messages] == [
        f"what is there at {expected[0]}",
        f"yes {expected[1]}",
    ]


def test_the_named_clip_is_meant(world: World) -> None:
    _, processor = composed(world, {"type": "percent"})
    two = [{"type": "video", "video": name} for name in ("000.mp4", "001.mp4")]
    content = [*two, at(2.0), at(2.0, clip=0)]
    given = Sample.model_validate({"id": "s", "messages": [{"role": "user", "content": content}]})
    assert processor.content.write(given.messages, [20.0, 5.0]).messages[0].text == "40%10%"


def test_added_words_are_tokens_and_come_back_as_seconds(world: World) -> None:
    model, processor = composed(world, ANCHORS)
    assert model.words is not None
    given = sample(text("red "), span(0.0, 0.5))
    clips = MediaReader(processor).inputs(given.media, world.captions.parent)
    row = processor.row(given, clips)
    words = model.config.words
    assert row.duration == clips[0]["video"].duration
    ids = torch.tensor([[words["<t0>"], words["<t2>"]]])
    assert processor.decode(ids) == ["<t0> <t2>"]
    assert processor.decode(ids, [8.0]) == ["0.0 s to 4.0 s"]
    assert processor.decode(ids, [None]) == ["<t0> <t2>"]
    assert words["<t0>"] in row.input_ids.tolist()


def test_a_checkpoint_keeps_codec_and_words(world: World, tmp_path: Path) -> None:
    model, processor = composed(world, ANCHORS)
    save_checkpoint(model, processor, tmp_path, [])
    loaded = AVLLM.from_pretrained(tmp_path, allow_parts=[ANCHORS["type"]])
    reader = AVProcessor.from_pretrained(tmp_path, allow_parts=[ANCHORS["type"]])
    assert (
        reader.content.codec.words() == list(loaded.config.words) == processor.content.codec.words()
    )
    given = sample(text("red "), at(0.5))
    clips = MediaReader(reader).inputs(given.media, world.captions.parent)
    assert torch.equal(reader.row(given, clips).input_ids, processor.row(given, clips).input_ids)


def test_words_of_a_codec_are_not_forgotten(world: World) -> None:
    description = ModelConfig.model_validate(world.model | {"time_codec": ANCHORS})
    _, ids = load_tokenizer(description)
    with pytest.raises(UserError, match="5 added words"):
        AVLLM.from_backbones(description, ids)


@pytest.mark.parametrize(
    ("codec", "given", "reason", "field"),
    [
        (None, sample(at(7.0)), "outside_clip", "messages.1.content.0"),
        (
            {"type": "percent"},
            sample(text("to "), span(0.5, 2.0)),
            "outside_clip",
            "messages.1.content.1",
        ),
        (ANCHORS, sample(text("it is <t3>")), "reserved_text", "messages.1.content.0"),
    ],
)
def test_times_that_cannot_be_written(
    world: World, codec: dict[str, Any] | None, given: Sample, reason: str, field: str
) -> None:
    _, processor = composed(world, codec)
    with pytest.raises(RowError, match=field) as error:
        rendered(processor, given, world)
    assert error.value.reason == reason


def test_without_a_duration_percent_is_refused(world: World) -> None:
    _, processor = composed(world, {"type": "percent"})
    with pytest.raises(RowError) as error:
        processor.content.write(sample(at(0.5)).messages, [None])
    assert error.value.reason == "no_duration"


def test_a_chat_without_its_clips_says_seconds(world: World) -> None:
    _, processor = composed(world, ANCHORS)
    messages = sample(text("red "), at(0.5)).messages
    assert "red 0.5 s" in str(processor.apply_chat_template(messages))


def test_a_time_between_two_words_is_a_soft_target(world: World) -> None:
    model, processor = composed(world, ANCHORS)
    given = sample(text("red "), at(0.3), text(" and "), at(0.0), text(" "), at(0.6))
    clips = MediaReader(processor).inputs(given.media, world.captions.parent)
    duration = clips[0]["video"].duration
    assert duration is not None
    row = processor.row(given, clips)
    assert row.soft is not None
    names = {i: word for word, i in model.config.words.items()}
    shares = [0.3 / duration * 4 - 1, 0.6 / duration * 4 - 2]
    assert [names[int(i)] for i in row.soft.id] == ["<t1>", "<t2>", "<t2>", "<t3>"]
    expected = [1 - shares[0], shares[0], 1 - shares[1], shares[1]]
    assert row.soft.weight.tolist() == pytest.approx(expected, abs=1e-5)
    for place in set(row.soft.place.tolist()):
        here = row.soft.place == place
        assert int(row.input_ids[place]) == int(row.soft.id[here][row.soft.weight[here].argmax()])
        assert int(row.labels[place]) == int(row.input_ids[place])
    hard = replace(row, soft=None)
    objective = NextToken(model)
    losses = [objective(model, processor.collate([one]))[0] for one in (row, hard)]
    assert abs(float(losses[0]) - float(losses[1])) > 1e-4
    losses[0].backward()
    assert model.words is not None
    assert model.words.output.weight.grad is not None
    assert bool((model.words.output.weight.grad.abs().sum(1) > 0).all())
