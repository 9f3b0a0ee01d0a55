"""Conversations of the toy world: each question once, nothing to guess, every answer trained on."""

from __future__ import annotations

import importlib
import json
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from answering import make_checkpoint
from tiny import COLOURS, make_data, make_llm, make_world, text, write_rows

from avllm.config_model import ModelConfig
from avllm.data.packing import share_media
from avllm.data.reading import MediaReader
from avllm.data.row import IGNORE, Row
from avllm.data.schema import Sample
from avllm.models.building.described import described_processor
from avllm.models.modeling_avllm import AVLLM
from avllm.models.processing_avllm import AVProcessor

WORLD = Path(__file__).resolve().parents[2] / "scripts" / "toy_world"
for folder in (WORLD / "backbones", WORLD):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

asking = importlib.import_module("asking")
balance = importlib.import_module("balance")
chat_balance = importlib.import_module("chat_balance")
chats = importlib.import_module("chats")
figures = importlib.import_module("figures")
questions = importlib.import_module("questions")
report = importlib.import_module("report")
scripting = importlib.import_module("scripting")

Rows = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def scripts() -> Rows:
    """Scripts of a whole-size world; no file is needed to count what they say."""
    sizes = scripting.split_sizes(3000)
    return {split: scripting.script_split(0, split, sizes[split]) for split in ("train", "test")}


@pytest.fixture(scope="module")
def rows(scripts: Rows) -> Rows:
    return {split: questions.question_rows(of, split, 0) for split, of in scripts.items()}


def turns_of(row: dict[str, Any]) -> list[tuple[str, str]]:
    """Question and answer of each turn."""
    texts = [message["content"][-1]["text"] for message in row["messages"]]
    return list(zip(texts[::2], texts[1::2], strict=True))


def test_conversations_hold_each_training_question_once(rows: Rows) -> None:
    made = chats.training_chats(rows["train"], "train", 0)
    clips = [row["meta"]["clip"] for row in made]
    assert len(set(clips)) == 1 + sum(a != b for a, b in pairwise(clips)), "those of a clip adjoin"

    def asked(manifest: list[dict[str, Any]]) -> Counter[tuple[str, str, str]]:
        return Counter((row["meta"]["clip"], *turn) for row in manifest for turn in turns_of(row))

    assert asked(made) == asked(rows["train"])
    counts = chats.count_turns(made)
    assert set(counts) == {"1", "2", "3"}
    later = counts["2"] + 2 * counts["3"]
    assert 0.3 < later / len(rows["train"]) < 0.6, "share of questions that are a later turn"
    assert counts["3"] > 0.08 * len(made)
    for row in made:
        media = [part for m in row["messages"] for part in m["content"] if part["type"] != "text"]
        assert len(media) == 1
        assert row["messages"][0]["content"][0] == media[0]
    assert len({row["id"] for row in made}) == len(made)


def test_a_held_out_question_is_asked_alone_and_as_second_and_third_turn(rows: Rows) -> None:
    single = {row["id"]: row for row in rows["test"]}
    made = chats.held_out_chats(rows["test"], "test", 0)
    assert chats.count_turns(made) == {"2": chats.ASKED_BY_TURN, "3": chats.ASKED_BY_TURN}
    for second, third in zip(made[::2], made[1::2], strict=True):
        assert second["meta"]["last"] == third["meta"]["last"]
        alone = single[second["meta"]["last"]]
        for row, turns in ((second, 2), (third, 3)):
            assert row["meta"]["turn"] == turns == len(turns_of(row))
            assert turns_of(row)[-1] == turns_of(alone)[0]
            assert row["kind"] == alone["kind"]
            assert row.get("choices") == alone.get("choices")
        assert turns_of(third)[1:] == turns_of(second)
    kinds = Counter(row["kind"] for row in made)
    assert set(kinds) == {*questions.CHOICES, questions.REFUSAL}
    assert max(kinds.values()) <= 2 * min(kinds[kind] for kind in questions.CHOICES)
    for row in made:
        Sample.model_validate(row)


def judged(rows: Rows) -> dict[str, dict[str, Any]]:
    """Return the report of what earlier turns give away, and nothing else."""
    kinds = [*questions.WORDINGS, questions.REFUSAL]
    lines: dict[str, dict[str, Any]] = {kind: {"chance": 1.0, "blind_mae_s": 1.0} for kind in kinds}
    chat_balance.add_later_turns(lines, rows)
    return lines


def too_well(lines: dict[str, dict[str, Any]]) -> set[tuple[str, str]]:
    problems = []
    for kind, line in lines.items():
        problems += balance.guessed_too_well(kind, line, "earlier")
    return {(problem.kind, problem.reason) for problem in problems}


def test_earlier_turns_do_not_give_a_later_answer_away(rows: Rows) -> None:
    lines = judged(rows)
    assert all("earlier" in line for line in lines.values())
    assert too_well(lines) == set()


def test_the_check_finds_earlier_turns_that_give_an_answer_away(
    rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Conversations of questions that do not fit together do not pass."""
    monkeypatch.setattr(chats, "fits", lambda row, others: True)
    assert too_well(judged(rows)) >= {
        ("seen.number", "guessed"),  # "what colour is the thing" is asked about a single one
        ("both.sync", "guessed"),  # by the number of silent bounces
        ("both.silent", "guessed"),
        ("heard.kind", "guessed"),  # pulses are counted of pulses
        (questions.REFUSAL, "guessed"),  # a stream that is missing is missing for all questions
    }


def test_every_answer_of_a_conversation_is_trained_on_alone_and_packed(
    rows: Rows, tmp_path: Path
) -> None:
    llm = importlib.import_module("llm")
    world = make_world(tmp_path / "tiny", clips=1)
    made = chats.training_chats(rows["train"], "train", 0)
    longest = next(row for row in made if len(row["messages"]) == 6)
    of_clip = [row for row in made if row["meta"]["clip"] == longest["meta"]["clip"]]
    texts = [words for row in of_clip for turn in turns_of(row) for words in turn]
    folder = make_llm(tmp_path / "llm")
    llm.build_tokenizer(texts).save_pretrained(folder)
    settings = {**world.model, "llm": {"name": str(folder)}}
    processor = described_processor(ModelConfig.model_validate(settings))
    samples = [Sample.model_validate(with_clip(row, "000.mp4")) for row in of_clip]
    reader = MediaReader(processor)
    made_rows = [
        processor.row(sample, reader.inputs(sample.media, world.root / "data"))
        for sample in samples
    ]
    answers = [[answer for _, answer in turns_of(row)] for row in of_clip]
    assert [trained(row, processor.tokenizer) for row in made_rows] == answers
    (packed,) = share_media(made_rows, 4096)
    together = [answer for of_row in answers for answer in of_row]
    assert sorted(trained(packed, processor.tokenizer)) == sorted(together)


def test_the_report_shows_the_same_questions_by_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tiny model with random weights is asked; its figures are those of its answers."""
    checkpoint = make_checkpoint(tmp_path / "tiny")
    loaded = AVLLM.from_pretrained(str(checkpoint)), AVProcessor.from_pretrained(checkpoint)
    monkeypatch.setattr(asking, "load", lambda folder: loaded)
    world = tmp_path / "run" / "world"
    make_data(world, 3)
    (tmp_path / "run" / "evaluation").mkdir()
    single = [question(number, turn=1) for number in range(3)]
    later = [question(number, turn=turn) for number in range(2) for turn in (2, 3)]
    write_rows(world / "test.jsonl", single)
    write_rows(world / "chats_test.jsonl", later)
    run = tmp_path / "run"
    of_single, of_later = (
        asking.ask_part(run, asking.share_out(run, name, 0, 1), False)["as_is"]
        for name in ("test", "chats_test")
    )
    by_turn = asking.figures_by_turn(of_single, of_later)
    assert {turn: row["n"] for turn, row in by_turn.items()} == {"1": 2, "2": 2, "3": 2}
    right = {p.sample.id: p.score.correct for p in of_later.predictions}
    for turn in ("2", "3"):
        share = sum(right[f"{number}-{turn}"] for number in range(2)) / 2
        assert by_turn[turn]["accuracy"] == share
    turns = figures.turns_of(by_turn)
    assert all(row["chance"] >= 0.25 for row in turns.values())
    shown = report.table_text(figures.turn_table({"turns": turns}))
    assert [line.split("│")[1].strip() for line in shown.splitlines() if "│" in line] == [*"123"]


def question(number: int, turn: int) -> dict[str, Any]:
    """Return a row of the tiny world after ``turn - 1`` questions about the same clip."""
    asked = {"role": "user", "content": [text("what colour is it ?")]}
    answered = {"role": "assistant", "content": [text(list(COLOURS)[number])]}
    messages = [asked, answered] * turn
    clip = {"type": "video", "video": f"{number:03d}.mp4"}
    messages[0] = {**asked, "content": [clip, *asked["content"]]}
    return {
        "id": f"{number}-{turn}",
        "kind": "seen.colour",
        "messages": messages,
        "choices": list(COLOURS),
        "meta": {"clip": str(number), "turn": turn, "last": f"{number}-1"},
    }


@pytest.mark.parametrize(("third", "reached"), [(0.96, True), (0.91, True), (0.8, False)])
def test_the_last_turn_has_to_be_as_good_as_the_first_within_its_interval(
    third: float, reached: bool
) -> None:
    row = {"n": 240, "accuracy": 0.95, "low": 0.91, "high": 0.97, "chance": 0.3}
    bar = figures.turn_bar({"1": row, "2": row, "3": {**row, "accuracy": third}})
    assert bar.reached == reached


def with_clip(row: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the row about another file, a video with picture and sound."""
    copy = json.loads(json.dumps(row))
    copy["messages"][0]["content"][0] = {"type": "video", "video": name}
    return copy


def trained(row: Row, tokenizer: Any) -> list[str]:
    """Return the text of each part that has labels, without the end token."""
    texts = []
    for part in row.parts:
        labels = row.labels[part.trained]
        assert (labels != IGNORE).all()
        assert labels[-1] == tokenizer.eos_token_id
        texts.append(tokenizer.decode(labels[:-1]).strip())
    assert sum(len(row.labels[part.trained]) for part in row.parts) == row.num_targets
    return texts
