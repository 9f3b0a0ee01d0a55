"""Thoughts are no answer, also where they do not end; stop tokens follow the model's template."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from chat_models import ALWAYS_THOUGHTS, EMPTY_THOUGHTS, OPENED_THOUGHTS, make_byte_llm
from tiny import World, make_world, row, text

from avllm.config_model import ModelConfig
from avllm.data.schema import RowError, Sample
from avllm.errors import UserError
from avllm.evaluation.answering import answer_rows as answer_all
from avllm.inference.batch import answer_samples
from avllm.inference.chat import Chat
from avllm.inference.generation import Generation, stop_ids
from avllm.models.building.placeholders import load_tokenizer
from avllm.models.modeling_avllm import AVLLM
from avllm.models.processing_avllm import AVProcessor
from avllm.models.rows.thoughts import ThoughtMarks

BY_ARGUMENT = """
{%- for m in messages %}
{{- m.role + ': ' + m.content + ('<|im_end|>' if ends is defined and ends else '\\n') }}
{%- endfor %}
{%- if add_generation_prompt %}assistant: {% endif %}"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), clips=1)


def chat_of(world: World, folder: Path, template: str, **arguments: Any) -> Chat:
    """A chat with a random LLM of bytes, which never closes its thoughts by chance."""
    llm = {"name": str(make_byte_llm(folder, template)), "chat_template_kwargs": arguments}
    description = ModelConfig.model_validate(world.model | {"llm": llm})
    tokenizer, ids = load_tokenizer(description)
    model = AVLLM.from_backbones(description, ids).eval()
    return Chat(model, AVProcessor.from_model(model, tokenizer))


def test_open_thoughts_are_an_empty_answer_with_its_reason(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chat = chat_of(world, tmp_path, ALWAYS_THOUGHTS, enable_thinking=True)
    assert "".join(chat.ask("what ?", max_new_tokens=6)) == ""
    (warning,) = chat.warnings
    assert "thoughts" in warning
    samples = [Sample.model_validate(row("a", [text("what ?")], "x"))]
    short = Generation(max_new_tokens=6)
    (line,) = answer_samples(chat.model, chat.processor, samples, generation=short)
    assert line == {"id": "a", "answer": "", "warnings": [warning]}
    rows = [chat.processor.row(sample, [], answer=False) for sample in samples * 2]
    logging.getLogger("avllm").propagate = True
    assert answer_all(chat.model, chat.processor, rows, batch_size=2, max_new_tokens=6) == ["", ""]
    assert "in 2 of 2 answers" in caplog.text


@pytest.mark.parametrize(
    ("template", "arguments", "generated", "answer"),
    [
        (EMPTY_THOUGHTS, {"enable_thinking": True}, "<think>\nwhy", ""),
        (EMPTY_THOUGHTS, {"enable_thinking": True}, "<think>\nwhy</think>so", "so"),
        (EMPTY_THOUGHTS, {"enable_thinking": True}, "so", "so"),
        (EMPTY_THOUGHTS, {}, "so <think> is a word", "so <think> is a word"),
        (EMPTY_THOUGHTS, {}, "<think>why", ""),
        (ALWAYS_THOUGHTS, {"enable_thinking": True}, "why", ""),
        (ALWAYS_THOUGHTS, {"enable_thinking": True}, "why</think>so", "so"),
        (OPENED_THOUGHTS, {}, "<think>\nwhy", ""),  # R1 thinks, whether it is asked to or not
        (OPENED_THOUGHTS, {}, "<think>\nwhy</think>so", "so"),
        (OPENED_THOUGHTS, {}, "so", "so"),
    ],
)
def test_an_answer_begins_after_the_thoughts(
    template: str,
    arguments: dict[str, Any],
    generated: str,
    answer: str,
    world: World,
    tmp_path: Path,
) -> None:
    processor = chat_of(world, tmp_path, template, **arguments).processor
    assert processor.answer_text(generated) == answer
    assert bool(processor.chat_text.warnings_about(generated)) == (answer == "")
    for size in range(len(generated)):  # while it streams, nothing of the thoughts is shown
        assert answer.startswith(processor.answer_text(generated[:size], whole=False))


def test_templates_without_thoughts_have_no_marks() -> None:
    assert ThoughtMarks.of("USER: A ASSISTANT: ", "USER: A ASSISTANT: ", asked=False) is None
    assert ThoughtMarks.of("", "", asked=False) is None
    marks = ThoughtMarks.of("<s>[INST] A [/INST]", "<s>[INST] A [/INST]", asked=False)
    assert marks is None or marks.cut("an answer [/INST]", whole=True) == "an answer [/INST]"


def test_stop_tokens_follow_the_templates_arguments(world: World, tmp_path: Path) -> None:
    end = "<|im_end|>"
    ids = {}
    for ends in (True, False):
        chat = chat_of(world, tmp_path / str(ends), BY_ARGUMENT, ends=ends)
        chat.processor.tokenizer.eos_token = "<|bos|>"
        chat.model.llm.generation_config.eos_token_id = None
        ids[ends] = stop_ids(chat.model, chat.processor)
        stop = chat.processor.tokenizer.convert_tokens_to_ids(end)
    assert stop in ids[True]
    assert stop not in ids[False]


def test_template_arguments_that_nothing_reads_name_the_nearest(
    world: World, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="did you mean 'enable_thinking'") as refused:
        chat_of(world, tmp_path / "a", EMPTY_THOUGHTS, enable_thinkin=True)
    assert refused.value.reason == "unknown_option"
    with pytest.raises(UserError):  # a word of the template, but none that it is given
        chat_of(world, tmp_path / "b", EMPTY_THOUGHTS, think=True)


def test_settings_of_an_answer_name_the_nearest(world: World, tmp_path: Path) -> None:
    chat = chat_of(world, tmp_path, BY_ARGUMENT)
    with pytest.raises(UserError, match="did you mean 'temperature'") as refused:
        chat.ask("what ?", temprature=1.0)
    assert refused.value.reason == "unknown_option"


def test_a_question_that_is_too_long_names_what_helps(world: World, tmp_path: Path) -> None:
    chat = chat_of(world, tmp_path, BY_ARGUMENT)
    with pytest.raises(RowError) as refused:
        chat.ask("what " * 3000)
    assert refused.value.reason == "too_long"
    assert "data.max_length" not in str(refused.value)
    assert "shorter" in str(refused.value)
