"""What a chat keeps between questions: times as parts, and files by what is in them now."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_models import DATED, make_byte_llm
from tiny import COLOURS, make_world, write_clip

from avllm.config_model import ModelConfig
from avllm.data.reading import MediaReader
from avllm.data.schema import Sample, TextPart, TimePart
from avllm.inference.chat import Chat
from avllm.models.building.placeholders import load_tokenizer
from avllm.models.configuration_avllm import AVConfig
from avllm.models.modeling_avllm import AVLLM
from avllm.models.processing_avllm import AVProcessor
from avllm.models.rows.content import Content
from avllm.tokens import duration_of


@pytest.mark.parametrize(
    "text, times",
    [("From 25% to 75%, then", 2), ("25%", 1), ("at 250% no", 0), ("none", 0), ("", 0)],
)
def test_an_answers_times_are_written_again_as_they_were(text: str, times: int) -> None:
    content = Content(AVConfig(time_codec={"type": "percent"}))
    parts = content.read(text, 8.0)
    row = {"id": "s", "messages": [{"role": "user", "content": [{"type": "video", "video": "v"}]}]}
    row["messages"] += [{"role": "assistant", "content": [part.model_dump() for part in parts]}]
    messages = Sample.model_validate(row).messages
    assert content.write(messages, [8.0]).messages[1].text == text
    assert sum(isinstance(part, TimePart) for part in parts) == times
    assert Content(AVConfig()).read(text, 8.0) == [TextPart(text=text)]


def test_a_second_question_follows_the_tokens_of_training(tmp_path: Path) -> None:
    world = make_world(tmp_path / "world", clips=1)
    llm = {"name": str(make_byte_llm(tmp_path / "llm", DATED))}
    description = ModelConfig.model_validate(
        world.model | {"llm": llm, "time_codec": {"type": "percent"}}
    )
    tokenizer, ids = load_tokenizer(description)
    model = AVLLM.from_backbones(description, ids).eval()
    chat = Chat(model, AVProcessor.from_model(model, tokenizer))
    batches: list[Any] = []

    def generate(batch: Any, streamer: Any, **options: Any) -> None:
        batches.append(batch)
        streamer.put(torch.tensor(tokenizer("at 50%.", add_special_tokens=False)["input_ids"]))

    model.generate = generate  # type: ignore[method-assign]
    clip = world.captions.parent / "000.mp4"
    assert "".join(chat.ask("When?", video=clip)) == "at 0.5 s."
    list(chat.ask("And then?"))
    half = (duration_of(chat._media[chat.messages[0].content[0]].inputs) or 0.0) / 2
    content = [
        {"type": "text", "text": "at "},
        {"type": "time", "seconds": half},
        {"type": "text", "text": "."},
    ]
    video = {"type": "video", "video": str(clip)}
    turns = [
        {"role": "user", "content": [video, {"type": "text", "text": "When?"}]},
        {"role": "assistant", "content": content},
        {"role": "user", "content": "And then?"},
        {"role": "assistant", "content": "never"},
    ]
    trained = Sample.model_validate({"id": "s", "messages": turns})
    row = chat.processor.row(trained, MediaReader(chat.processor).inputs(trained.media, None))
    prompt = batches[1].input_ids[0]
    assert torch.equal(row.input_ids[: len(prompt)], prompt)


def test_a_file_that_changed_is_read_again(checkpoint: Path, tmp_path: Path) -> None:
    chat = Chat.load(checkpoint)
    path = write_clip(tmp_path / "clip.mp4", COLOURS["red"], None)
    list(chat.ask("what colour is it ?", video=path, max_new_tokens=2))
    red = chat.perceived[0].frames
    write_clip(path, COLOURS["blue"], None)
    os.utime(path, ns=(1, 1))  # clocks of file systems are coarse
    list(chat.ask("and now ?", max_new_tokens=2))
    blue = chat.perceived[0].frames
    assert not torch.equal(red, blue)
    features = [media.features for media in chat._media.values()]
    list(chat.ask("and ?", max_new_tokens=2))
    assert [media.features for media in chat._media.values()] == features, (
        "an unchanged file is not read again"
    )
