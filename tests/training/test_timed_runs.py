"""Answers with times in added words: they train alone, and a killed run goes on the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from tiny import make_world, settings, write_rows
from tiny_runs import kill_after, rows, run

ANCHORS = {"type": "time_codecs.own_codecs:Anchors"}


def test_added_words_train_and_the_run_resumes(tmp_path: Path) -> None:
    world = make_world(tmp_path / "world", clips=4)
    timed = []
    for number, line in enumerate(world.captions.read_text().splitlines()):
        row = json.loads(line)
        row["messages"][1]["content"] = [{"type": "time", "seconds": 0.2 * number}]
        timed.append(row)
    changes: dict[str, Any] = {
        "model": world.model | {"time_codec": ANCHORS},
        "trainable": [["^words", 1e-2], [".*", None]],
        "data__train": str(write_rows(world.captions.parent / "timed.jsonl", timed)),
        "train__warmup": 0,
        "train__max_steps": 6,
    }
    straight = run(settings(world, tmp_path / "straight", **changes))
    asked = settings(world, tmp_path / "run", **changes, train__save_every=2)
    kill_after(asked, 3)
    killed = run(asked)
    assert rows(killed) == rows(straight)
    assert rows(straight)[-1]["loss"] < rows(straight)[0]["loss"]
    expected, seen = (load_file(folder / "trained.safetensors") for folder in (straight, killed))
    assert expected.keys() == seen.keys()
    assert all(bool((expected[name] == seen[name]).all()) for name in expected)
    assert {"words.input.weight", "words.output.weight"} <= expected.keys()
    assert not any(name.startswith("llm.") for name in expected)
