"""Preferences out of a model's own answers and out of rewritten ones, as stage 4 trains them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from answering import make_checkpoint
from making_fixtures import read_lines, recipe_module, write_lines
from tiny import World, make_world

from avllm.data.manifest import read_manifest
from avllm.data.schema import Sample
from avllm.evaluation.command import run_eval
from avllm.recipes import frame as recipe
from avllm.text_models.base import Answer


def question(name: str, answer: str, asked: str = "what colour is it ?") -> dict[str, Any]:
    content = [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": asked}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
    return {"id": name, "messages": messages, "licence": "CC0", "kind": "seen.colour"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Four questions about a clip, and the rules of a text model."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "a.mp4").write_bytes(b"clip")
    answers = ("a red car", "two dogs", "nothing", "rain")
    write_lines(folder / "train.jsonl", [question(f"q{n}", a) for n, a in enumerate(answers)])
    rules = [
        ["vague.*Answer: a red car", "something on wheels"],
        ["wrong.*Answer: a red car", "a blue car"],
        ["vague.*Answer: two dogs", "Two dogs."],
        ["wrong.*Answer: two dogs", "three dogs"],
        ["Answer: nothing", "FAILURE"],
        ["Answer: rain", "snow"],
    ]
    (folder / "rules.yaml").write_text(json.dumps({"rules": rules}))
    return folder


def rewritten(source: Path, output: Path, **options: Any) -> tuple[dict[str, Sample], list[str]]:
    module = recipe_module("rewrite_answers")
    model = f"rules:{source / 'rules.yaml'}"
    options = {"model": model, "set_name": "x", "shard_size": 3, **options}
    recipe.make(module.ABOUT, module.rows, source, output, name="rewrite_answers", **options)
    drops = [drop["reason"] for drop in read_lines(output / "dropped.jsonl")]
    return {sample.id: sample for sample in read_manifest(output / "train.jsonl")}, drops


def test_a_text_models_answers_are_rejected_ones(source: Path, tmp_path: Path) -> None:
    rows, drops = rewritten(source, tmp_path / "out")
    assert {name: row.rejected for name, row in rows.items()} == {
        "x-q0": ["something on wheels", "a blue car"],
        "x-q1": ["three dogs"],
        "x-q3": ["snow"],
    }
    assert sorted(drops) == ["vague_refused", "vague_same_answer", "wrong_refused"] + (
        ["wrong_same_answer"]
    )
    assert rows["x-q0"].answer == "a red car"
    assert rows["x-q0"].meta["rejected_as"] == ["vague", "wrong"]
    again, _ = rewritten(source, tmp_path / "again", workers=2, shard_size=1)
    assert {n: r.rejected for n, r in again.items()} == {n: r.rejected for n, r in rows.items()}
    vague, _ = rewritten(source, tmp_path / "vague", kinds="vague")
    assert vague["x-q0"].rejected == ["something on wheels"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model": ""}, "no_model"),
        ({"kinds": "vague,rude"}, "bad_kinds"),
        ({"manifest": "nothing.jsonl"}, "no_file"),
    ],
)
def test_what_cannot_begin_says_why(
    source: Path, tmp_path: Path, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(recipe.RecipeError) as caught:
        rewritten(source, tmp_path / "out", **options)
    assert caught.value.reason == reason


def test_faults_of_rewritten_answers() -> None:
    module = recipe_module("rewrite_answers")
    assert module.fault_of(Answer("snow"), ["rain"]) is None
    assert module.fault_of(Answer("下雪"), ["下雨"]) is None
    assert module.fault_of(Answer("下雨"), ["下雨"]) == "same_answer"
    assert module.fault_of(Answer("  "), ["rain"]) == "empty"
    assert module.fault_of(Answer("", "cut_off"), ["rain"]) == "cut_off"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), clips=4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"))


def test_own_answers_of_an_evaluation_become_preferences(
    world: World, checkpoint: Path, tmp_path: Path
) -> None:
    folder = world.questions.parent
    predictions = folder / "predictions.jsonl"
    changes = {"without": ["audio"], "swap": ["video"], "predictions": predictions}
    run_eval(checkpoint, world.questions, **changes, max_new_tokens=4)
    module = recipe_module("own_answers")
    recipe.make(
        module.ABOUT,
        module.rows,
        folder,
        tmp_path / "out",
        name="own_answers",
        manifest=world.questions.name,
    )
    rows = read_manifest(tmp_path / "out" / "train.jsonl")
    answers: dict[str, set[str]] = {}
    for line in read_lines(predictions):
        if line["condition"] != "as_is" and not line["correct"]:
            answers.setdefault(line["id"], set()).add(line["answer"].strip())
    assert rows
    for row in rows:
        assert row.rejected
        assert set(row.rejected) <= answers[row.meta["of"]]
        assert row.answer not in row.rejected
