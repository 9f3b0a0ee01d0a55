"""The processor in transformers' form: saved, loaded, called; and templates that do not fit."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from tiny import World, make_world
from transformers import AutoProcessor, ProcessorMixin

from avllm.config_model import ModelConfig
from avllm.data.schema import RowError, Sample
from avllm.inference.chat import Chat
from avllm.models.building.placeholders import load_tokenizer
from avllm.models.checkpoint import save_checkpoint
from avllm.models.checkpoint_format import CheckpointError
from avllm.models.modeling_avllm import AVLLM
from avllm.models.processing_avllm import AVProcessor


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), clips=2)


@pytest.fixture(scope="module")
def folder(world: World) -> Path:
    """A checkpoint whose processor has been changed where it may be."""
    settings = ModelConfig.model_validate(world.model | {"media_text": {"video": "yes {media} no"}})
    tokenizer, ids = load_tokenizer(settings)
    torch.manual_seed(1)
    model = AVLLM.from_backbones(settings, ids).eval()
    processor = AVProcessor.from_model(model, tokenizer)
    processor.max_length, processor.timeout = 500, 7.0
    save_checkpoint(model, processor, world.root / "checkpoint", [])
    return world.root / "checkpoint"


@pytest.fixture
def processor(folder: Path) -> AVProcessor:
    return AVProcessor.from_pretrained(folder)


def asked(world: World) -> list[dict[str, object]]:
    clips = [
        {"type": kind, kind: str(world.captions.parent / "000.mp4")} for kind in ("video", "audio")
    ]
    return [{"role": "user", "content": [*clips, {"type": "text", "text": "what colour is it ?"}]}]


def test_saved_and_loaded_it_is_the_same(
    processor: AVProcessor, folder: Path, tmp_path: Path, world: World
) -> None:
    assert isinstance(processor, ProcessorMixin)
    processor.save_pretrained(tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert files <= {
        path.name for path in folder.iterdir()
    }  # nothing twice: the config is the model's
    for name in files:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    auto = AutoProcessor.from_pretrained(tmp_path)
    assert type(auto) is AVProcessor
    assert auto.to_dict() == processor.to_dict() == pickle.loads(pickle.dumps(processor)).to_dict()
    assert (auto.max_length, auto.timeout) == (500, 7.0)
    sample = {"id": "s", "messages": asked(world)}
    assert torch.equal(auto([sample]).input_ids, processor([sample]).input_ids)
    assert "max_length" in repr(auto)


def test_arguments_go_before_what_was_saved(folder: Path) -> None:
    changed = AVProcessor.from_pretrained(folder, max_length=10)
    assert (changed.max_length, changed.timeout) == (10, 7.0)
    with pytest.raises(TypeError, match=r"\['fps'\]"):
        AVProcessor.from_pretrained(folder, fps=2)


def test_a_folder_of_something_else_is_named(world: World, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"has no processor_config.json; expected an avllm checkpoint"
    ):
        AVProcessor.from_pretrained(world.llm)
    (tmp_path / "processor_config.json").write_bytes(
        (folder / "processor_config.json").read_bytes()
    )
    (tmp_path / "config.json").write_bytes((world.llm / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="is of a llama model"):
        AVProcessor.from_pretrained(tmp_path)


def test_a_chat_as_text_and_as_a_batch_that_answers(
    processor: AVProcessor, folder: Path, world: World
) -> None:
    text = processor.apply_chat_template(asked(world), add_generation_prompt=True)
    assert text == "USER: yes <|video|> no<|audio|>what colour is it ? ASSISTANT: "
    answered = [*asked(world), {"role": "assistant", "content": "red"}]
    assert processor.apply_chat_template(answered) == text + "red</s>"
    batch = processor.apply_chat_template(asked(world), add_generation_prompt=True, tokenize=True)
    assert torch.equal(processor([{"id": "s", "messages": answered}]).input_ids, batch.input_ids)
    chat = Chat.load(folder)
    said = processor.decode(chat.model.generate(batch, max_new_tokens=6))
    assert said == ["".join(chat.ask(asked(world), max_new_tokens=6))]
    trained = processor([{"id": "s", "messages": answered}], answer=True)
    assert (trained.labels >= 0).sum() == 2  # red and </s>


def test_relative_paths_start_where_the_caller_says(processor: AVProcessor, world: World) -> None:
    rows = [json.loads(line) for line in world.captions.read_text().splitlines()]
    batch = processor(rows, world.captions.parent)
    assert batch.ids == [row["id"] for row in rows]
    assert bool(
        batch.attention_mask[:, -1].all()
    )  # padded on the left, so that every row ends where it is answered


@pytest.mark.parametrize(
    "template, count",
    [
        ("{% for m in messages if m.role == 'assistant' %}{{ m.content }}{% endfor %}", 0),
        ("{% for m in messages %}{{ m.content + m.content }}{% endfor %}", 4),
        ("{% for m in messages %}{{ m | tojson }}{% endfor %}", 0),
    ],
)
def test_a_template_that_loses_or_repeats_media_is_refused(
    processor: AVProcessor, world: World, template: str, count: int
) -> None:
    processor.tokenizer.chat_template = template
    with pytest.raises(RowError, match=rf"\b{count}\b.*\b2\b") as caught:
        processor([Sample.model_validate({"id": "s", "messages": asked(world)})])
    assert caught.value.reason == "chat_template"
