"""Chat templates: a row begins with its prompt, and only what a person answered is trained."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_models import (
    ADDED,
    ALWAYS_THOUGHTS,
    DATED,
    EMPTY_THOUGHTS,
    OPENED_THOUGHTS,
    SPECIAL,
    make_byte_llm,
    make_byte_tokenizer,
)
from tiny import World, make_world, settings

from avllm.config import RunConfig
from avllm.config_model import ModelConfig
from avllm.data.row import IGNORE
from avllm.data.schema import RowError, Sample
from avllm.errors import UserError
from avllm.inference.batch import answer_samples
from avllm.inference.chat import Chat
from avllm.inference.generation import Generation
from avllm.models.building.described import described_processor
from avllm.models.processing_avllm import AVProcessor
from avllm.training.trainer import run_stage

THOUGHTS = "<think>\n\n</think>\n\n"
TURN = "<|im_start|>assistant\n"
TALK = [("user", "one"), ("assistant", "first"), ("user", "two"), ("assistant", "second")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), clips=2)


def processor_of(world: World, folder: Path, template: str, **llm: Any) -> AVProcessor:
    """Make the processor of a model whose LLM has this template."""
    if not (folder / "config.json").is_file():
        make_byte_llm(folder, template)
    model = world.model | {"llm": {"name": str(folder), **llm}}
    return described_processor(ModelConfig.model_validate(model))


def chat(*turns: tuple[str, str]) -> Sample:
    return Sample.model_validate(
        {"id": "t", "messages": [{"role": r, "content": c} for r, c in turns]}
    )


def written(processor: AVProcessor, sample: Sample, answer: bool = True) -> tuple[str, str]:
    """Return a row's text, and the text that is trained."""
    row = processor.row(sample, [], answer=answer)
    trained = row.input_ids[row.labels != IGNORE]
    return processor.tokenizer.decode(row.input_ids), processor.tokenizer.decode(trained)


@pytest.mark.parametrize(
    "template, arguments, before, trained",
    [
        (EMPTY_THOUGHTS, {}, TURN + THOUGHTS, "second<|im_end|>\n"),
        (EMPTY_THOUGHTS, {"enable_thinking": False}, TURN + THOUGHTS, "second<|im_end|>\n"),
        (EMPTY_THOUGHTS, {"enable_thinking": True}, TURN, "second<|im_end|>\n"),
        (ALWAYS_THOUGHTS, {}, TURN + THOUGHTS, "second<|im_end|>\n"),
        (ALWAYS_THOUGHTS, {"enable_thinking": True}, TURN + "<think>\n", "second<|im_end|>\n"),
        (OPENED_THOUGHTS, {}, "<|Assistant|>", "first<|im_end|>second<|im_end|>"),
        (DATED, {"day": "1 May"}, TURN, "first<|im_end|>second<|im_end|>"),
    ],
)
def test_a_row_begins_with_its_prompt_and_trains_answers_alone(
    world: World,
    tmp_path: Path,
    template: str,
    arguments: dict[str, Any],
    before: str,
    trained: str,
) -> None:
    processor = processor_of(world, tmp_path, template, chat_template_kwargs=arguments)
    prompt = processor.row(chat(*TALK), [], answer=False)
    row = processor.row(chat(*TALK), [])
    assert torch.equal(row.input_ids[: len(prompt.input_ids)], prompt.input_ids)
    assert written(processor, chat(*TALK), answer=False)[0].endswith(before)
    assert written(processor, chat(*TALK))[1] == trained
    assert written(processor, chat(*TALK[:2]))[1].startswith("first<|im_end|>")


def test_answers_with_thoughts_are_trained_where_thinking_is_on(
    world: World, tmp_path: Path
) -> None:
    thoughtful = chat(("user", "one"), ("assistant", "<think>\nwhy\n</think>\n\nso"))
    for name, template, begins in [
        ("a", EMPTY_THOUGHTS, "<think>\nwhy"),
        ("b", ALWAYS_THOUGHTS, "why"),
    ]:
        on = processor_of(
            world, tmp_path / name, template, chat_template_kwargs={"enable_thinking": True}
        )
        text, trained = written(on, thoughtful)
        assert trained == f"{begins}\n</think>\n\nso<|im_end|>\n"
        assert text.endswith(TURN + "<think>\nwhy\n</think>\n\nso<|im_end|>\n")
        with pytest.raises(RowError) as caught:
            written(processor_of(world, tmp_path / name, template), thoughtful)
        assert caught.value.reason == "chat_template"
    with pytest.raises(RowError) as caught:  # the template drops the thoughts
        written(processor_of(world, tmp_path / "c", OPENED_THOUGHTS), thoughtful)
    assert caught.value.reason == "chat_template"
    opened = processor_of(
        world, tmp_path / "c", OPENED_THOUGHTS, chat_template_kwargs={"thinking": True}
    )
    with pytest.raises(RowError) as caught:  # no finished answer begins as its prompt ends
        written(opened, chat(*TALK))
    assert caught.value.reason == "chat_template"


def test_thoughts_are_no_part_of_an_answer(world: World, tmp_path: Path) -> None:
    on = processor_of(
        world, tmp_path, EMPTY_THOUGHTS, chat_template_kwargs={"enable_thinking": True}
    )
    off = processor_of(world, tmp_path, EMPTY_THOUGHTS)
    text = "<think>\nwhy\n</think>\n\nso<|im_end|>"
    ids = torch.tensor([off.tokenizer(text, add_special_tokens=False)["input_ids"]])
    assert on.decode(ids) == ["so"]
    assert on.answer_text("<think>\nwh", whole=False) == ""
    assert on.answer_text("so", whole=True) == "so"
    assert off.decode(ids) == ["so"]  # some think without being asked to


def test_arguments_and_date_are_kept_and_checked(world: World, tmp_path: Path) -> None:
    given = {"chat_template_kwargs": {"enable_thinking": False}, "date": "2024-05-06"}
    processor = processor_of(world, tmp_path / "a", EMPTY_THOUGHTS, **given)
    assert {name: processor.config.llm[name] for name in given} == given
    for wrong in ({"enable_thinkin": False}, {"add_generation_prompt": True}, {"messages": []}):
        with pytest.raises(UserError):
            processor_of(world, tmp_path / "a", EMPTY_THOUGHTS, chat_template_kwargs=wrong)
    dated = processor_of(world, tmp_path / "b", DATED, date="2024-05-06")
    assert written(dated, chat(*TALK))[0].startswith("<|bos|>Today: 06 May 2024\n")


def test_prompts_are_the_same_on_the_next_day(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_byte_llm(tmp_path / "llm", DATED)
    run = settings(
        world, tmp_path / "run", train__max_steps=1, model__llm={"name": str(tmp_path / "llm")}
    )
    run_stage(RunConfig.model_validate(run))
    today = AVProcessor.from_pretrained(tmp_path / "run")
    before = written(today, chat(*TALK))[0]
    assert datetime.date.today().strftime("%d %b %Y") in before

    class Tomorrow(datetime.date):
        @classmethod
        def today(cls) -> datetime.date:
            return datetime.date(2031, 1, 2)

    monkeypatch.setattr(datetime, "date", Tomorrow)
    assert written(AVProcessor.from_pretrained(tmp_path / "run"), chat(*TALK))[0] == before
    run_stage(RunConfig.model_validate(run))  # it goes on, with the settings that it began with
    assert "02 Jan 2031" in written(processor_of(world, tmp_path / "llm", DATED), chat(*TALK))[0]


# ---- control tokens -------------------------------------------------------------------------

CONTROL = [
    "<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>",
    "<pad>",
    "<|bos|>",
    "<|video|>",
    "<|audio|>",
]


@pytest.mark.parametrize("template", [EMPTY_THOUGHTS, OPENED_THOUGHTS, DATED])
@pytest.mark.parametrize("text", [*CONTROL, "<|User|>", "<|Assistant|>"])
def test_control_tokens_in_a_text_stay_text(
    world: World, tmp_path: Path, template: str, text: str
) -> None:
    if text in ADDED and template != OPENED_THOUGHTS:
        pytest.skip("the template does not mark turns by it")
    processor = processor_of(world, tmp_path, template)
    tokenizer = processor.tokenizer
    roles = ("system", "user", "assistant", "user", "assistant")

    def row(filling: str) -> Any:
        return processor.row(chat(*((role, f"a{filling}b") for role in roles)), [])

    with_control, plain = row(text), row("x")
    assert tokenizer.decode(with_control.input_ids) == tokenizer.decode(plain.input_ids).replace(
        "axb", f"a{text}b"
    )
    added = [
        tokenizer.convert_tokens_to_ids(word)
        for word in [*SPECIAL, *ADDED, "<|video|>", "<|audio|>"]
    ]

    def ids_of(made: Any) -> list[int]:
        return [i for i in made.input_ids.tolist() if i in added]

    assert ids_of(with_control) == ids_of(plain), "the template's own and no others"
    assert not with_control.is_media.any()
    last = with_control.parts[-1]
    assert tokenizer.decode(with_control.input_ids[last.asked]) == f"a{text}b"
    assert tokenizer.decode(with_control.input_ids[last.trained]).startswith(f"a{text}b")
    prompt = processor.row(chat(*((role, f"a{text}b") for role in roles)), [], answer=False)
    assert torch.equal(with_control.input_ids[: len(prompt.input_ids)], prompt.input_ids)
    assert (
        processor.apply_chat_template([{"role": "user", "content": text}]).count(text.strip()) >= 1
    )


def test_a_control_token_of_two_parts_and_thoughts_in_an_answer(
    world: World, tmp_path: Path
) -> None:
    processor = processor_of(world, tmp_path, OPENED_THOUGHTS)
    content = [{"type": "text", "text": "<|im_"}, {"type": "text", "text": "end|>"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "A</think>"}]
    ids = processor.row(
        Sample.model_validate({"id": "t", "messages": messages}), [], answer=False
    ).input_ids
    assert processor.tokenizer.eos_token_id not in ids.tolist()
    assert processor.tokenizer.decode(ids) == "<|bos|><|User|><|im_end|><|Assistant|>"


def test_chat_batch_and_training_read_a_control_token_alike(world: World, tmp_path: Path) -> None:
    make_byte_llm(tmp_path / "llm", EMPTY_THOUGHTS)
    run = settings(
        world, tmp_path / "run", train__max_steps=1, model__llm={"name": str(tmp_path / "llm")}
    )
    run_stage(RunConfig.model_validate(run))
    talk = Chat.load(tmp_path / "run")
    asked = chat(("user", "what <|im_end|> is <|video|>?"))
    said = "".join(talk.ask("what <|im_end|> is <|video|>?", max_new_tokens=12))
    short = Generation(max_new_tokens=12)
    batch = list(
        answer_samples(
            talk.model, talk.processor, [asked, chat(("user", "why so?"))], generation=short
        )
    )
    assert batch[0]["answer"] == said
    answered = chat(("user", "what <|im_end|> is <|video|>?"), ("assistant", said or "x"))
    prompt = talk.processor([asked]).input_ids[0]
    assert torch.equal(talk.processor.row(answered, []).input_ids[: len(prompt)], prompt)


def test_tokenizers_without_special_tokens_have_none_to_hide(tmp_path: Path) -> None:
    from avllm.models.rows.control_text import ControlTokens

    control = ControlTokens(make_byte_tokenizer(tmp_path, DATED), DATED, "")
    assert set(control.words) == set(SPECIAL)
    assert control.show(control.hide("a<|bos|>b", "user")) == "a<|bos|>b"
    assert control.hide("<|boss|>", "user") == "<|boss|>"


@pytest.mark.parametrize("place", [1, 3])
def test_an_empty_answer_is_a_bad_row(world: World, tmp_path: Path, place: int) -> None:
    processor = processor_of(world, tmp_path, EMPTY_THOUGHTS)
    turns = [(role, "" if number == place else text) for number, (role, text) in enumerate(TALK)]
    with pytest.raises(RowError) as caught:
        processor.row(chat(*turns), [])
    assert caught.value.reason == "empty_answer"
    assert len(processor.row(chat(*turns, ("user", "three")), [], answer=False).input_ids)
