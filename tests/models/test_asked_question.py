"""A connector that reads the question reads the asked one: training, chat, batch, evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import World, make_world, settings
from torch import Tensor

import avllm.models.asked
from avllm.config import RunConfig
from avllm.config_model import ModelConfig
from avllm.data.collate import Batch
from avllm.data.reading import MediaReader
from avllm.data.row import Row
from avllm.data.row_makers.each_turn import EachTurn
from avllm.data.schema import Sample
from avllm.errors import UserError
from avllm.inference.chat import Chat
from avllm.models.building.placeholders import load_tokenizer
from avllm.models.modeling_avllm import AVLLM
from avllm.models.processing_avllm import AVProcessor
from avllm.training.start import build_datasets, build_parts

QFORMER = {"type": "qformer", "num_queries": 2, "dim": 16, "layers": 2, "heads": 2, "per": "clip"}
FIRST, SECOND = "what colour is it ?", "is the sound low or high ?"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("asked"), clips=3)


def connector(source: str) -> list[dict[str, Any]]:
    qformers = [
        QFORMER | {"stream": stream, "instruction": source} for stream in ("video", "audio")
    ]
    return [*qformers, {"type": "linear", "stream": "video"}, {"type": "linear", "stream": "audio"}]


@pytest.fixture(scope="module", params=["llm", "tokenizer"])
def model(request: pytest.FixtureRequest, world: World) -> tuple[AVLLM, AVProcessor]:
    torch.manual_seed(0)
    source = "llm" if request.param == "llm" else str(world.llm)
    description = ModelConfig.model_validate(world.model | {"connector": connector(source)})
    tokenizer, ids = load_tokenizer(description)
    composed = AVLLM.from_backbones(description, ids).eval()
    with torch.no_grad():  # at the start the words' embeddings are small: let the question matter
        for adapter in composed.connector.adapters[:2]:
            for name, parameter in adapter.named_parameters():
                if name.startswith(("instruction.", "query")):
                    parameter.mul_(50)
    return composed, AVProcessor.from_model(composed, tokenizer)


def talk(world: World, *questions: str, answered: int) -> Sample:
    """A chat about the first clip: all questions, of which the first ones are answered."""
    messages: list[dict[str, Any]] = []
    for number, question in enumerate(questions):
        clip = (
            [{"type": "video", "video": str(world.captions.parent / "000.mp4")}]
            if number == 0
            else []
        )
        messages.append({"role": "user", "content": [*clip, {"type": "text", "text": question}]})
        if number < answered:
            messages.append({"role": "assistant", "content": "red"})
    return Sample.model_validate({"id": "t", "messages": messages})


def rows_of(processor: AVProcessor, sample: Sample, answer: bool) -> list[Row]:
    clips = MediaReader(processor).inputs(sample.media, None)

    def make(part: Sample, *, last_only: bool = False, variant: str | None = None) -> Row:
        return processor.row(part, clips, answer, last_only=last_only, variant=variant)

    return EachTurn().rows(sample, make, None) if answer else [make(sample)]


def media(model: AVLLM, batch: Batch) -> dict[str, Tensor]:
    with torch.no_grad():
        return {name: tokens.x for name, tokens in model.media_tokens(batch).items()}


def test_question_tokens_are_the_questions_text_alone(
    model: tuple[AVLLM, AVProcessor], world: World
) -> None:
    _, processor = model
    rows = rows_of(processor, talk(world, FIRST, SECOND, answered=2), answer=True)
    assert [len(row.parts) for row in rows] == [1, 1]
    for row, question in zip(rows, (FIRST, SECOND), strict=True):
        (part,) = row.parts
        assert part.question == question
        words = processor.tokenizer.decode(row.input_ids[part.asked])
        assert (
            words.split() == question.replace(" ?", "?").split()
            or words.split() == question.split()
        )
        assert not row.is_media[part.asked].any()
        assert bool((row.labels[part.trained] == row.input_ids[part.trained]).all())
        assert row.num_targets == len(part.trained)


def test_the_second_question_makes_other_tokens(
    model: tuple[AVLLM, AVProcessor], world: World
) -> None:
    llm, processor = model
    one = rows_of(processor, talk(world, FIRST, FIRST, answered=1), answer=False)
    other = rows_of(processor, talk(world, FIRST, SECOND, answered=1), answer=False)
    same, different = (media(llm, processor.collate(rows, "left")) for rows in (one, other))
    assert all(float((same[name] - different[name]).abs().max()) > 1e-3 for name in same)


def test_chat_batch_and_training_read_the_same_question(
    model: tuple[AVLLM, AVProcessor], world: World
) -> None:
    llm, processor = model
    training = rows_of(processor, talk(world, FIRST, SECOND, answered=2), answer=True)[1]
    prompt = rows_of(processor, talk(world, FIRST, SECOND, answered=1), answer=False)
    alone = media(llm, processor.collate([training]))
    in_batch = media(
        llm,
        processor.collate(
            [*prompt, *rows_of(processor, talk(world, FIRST, answered=0), False)], "left"
        ),
    )
    chat = Chat(llm, processor)
    seen: list[dict[str, Tensor]] = []
    generate = llm.generate

    def watched(batch: Batch, **arguments: Any) -> Tensor:
        seen.append(media(llm, batch))
        return generate(batch, **arguments)

    llm.generate = watched  # type: ignore[method-assign]
    try:
        "".join(chat.ask(FIRST, video=world.captions.parent / "000.mp4", max_new_tokens=1))
        chat.messages[-1] = chat.messages[-1].model_copy(
            update={"content": talk(world, FIRST, answered=1).messages[1].content}
        )
        "".join(chat.ask(SECOND, max_new_tokens=1))
    finally:
        del llm.generate
    for name, x in alone.items():
        torch.testing.assert_close(in_batch[name][:1], x, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(seen[1][name], x, rtol=1e-5, atol=1e-5)
        assert float((seen[0][name] - x).abs().max()) > 1e-3


def test_a_mutant_that_reads_the_first_question_is_seen(
    model: tuple[AVLLM, AVProcessor], world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, processor = model
    row = processor.row(
        talk(world, FIRST, SECOND, answered=2),
        MediaReader(processor).inputs(talk(world, FIRST, answered=0).media, None),
    )
    right = media(
        llm, processor.collate(rows_of(processor, talk(world, FIRST, SECOND, answered=2), True)[1:])
    )
    assert len(row.parts) == 2
    with pytest.raises(UserError, match="each_turn") as refused:  # one clip, two questions
        media(llm, processor.collate([row]))
    assert refused.value.reason == "two_questions"
    monkeypatch.setattr(avllm.models.asked, "part_of_clip", lambda parts, batch: batch.clip_row * 0)
    wrong = media(llm, processor.collate([row]))
    assert any(float((wrong[name] - x).abs().max()) > 1e-3 for name, x in right.items())


def test_questions_without_clips_are_no_questions_about_one_clip(
    model: tuple[AVLLM, AVProcessor],
) -> None:
    llm, processor = model
    texts = [
        Sample.model_validate({"id": q, "messages": [{"role": "user", "content": q}]})
        for q in (FIRST, SECOND)
    ]
    batch = processor.collate([processor.row(sample, [], answer=False) for sample in texts], "left")
    with torch.no_grad():
        assert torch.isfinite(llm(batch).logits).all()


def test_a_batchs_parts_hold_no_tensors(model: tuple[AVLLM, AVProcessor], world: World) -> None:
    """Each would be an open file between a loader worker and its process."""
    _, processor = model
    parts = processor.collate(
        rows_of(processor, talk(world, FIRST, SECOND, answered=2), True)
    ).parts
    assert {id(part.asked) for part in parts.items} | {
        id(part.trained) for part in parts.items
    } == {id(parts.items[0].asked)}
    assert parts.items[0].asked.numel() == 0


def test_training_unrolls_chats_for_such_a_connector(world: World, tmp_path: Path) -> None:
    manifest = tmp_path / "chat.jsonl"
    manifest.write_text(talk(world, FIRST, SECOND, answered=2).model_dump_json() + "\n")
    config = RunConfig.model_validate(settings(world, tmp_path / "run", data__train=str(manifest)))
    assert config.model is not None
    config.model.connector = connector("llm")
    parts = build_parts(config)
    dataset, _ = build_datasets(config, parts)
    loaded = dataset[0]
    assert [[part.question for part in row.parts] for row in loaded.rows] == [[FIRST], [SECOND]]
    batch = parts.processor.collate(loaded.rows)
    tokens = media(parts.model, batch)
    assert all(x.shape[0] == 2 for x in tokens.values()), "each row has its own copy of the clip"


def test_each_turn_has_the_loss_of_the_whole_chat(world: World, tmp_path: Path) -> None:
    from avllm.objectives.next_token import NextToken

    config = RunConfig.model_validate(settings(world, tmp_path / "run"))
    parts = build_parts(config)
    parts.model.eval()
    sample = talk(world, FIRST, SECOND, answered=2)
    clips = MediaReader(parts.processor).inputs(sample.media, None)
    objective = NextToken(parts.model)
    whole = parts.processor.collate([parts.processor.row(sample, clips)])
    turns = parts.processor.collate(rows_of(parts.processor, sample, answer=True))
    assert objective.weight(whole) == objective.weight(turns)
    with torch.no_grad():
        torch.testing.assert_close(
            objective(parts.model, whole)[0], objective(parts.model, turns)[0], rtol=1e-5, atol=1e-5
        )
