"""Test captions in the opposite order by a text model, among those that do not fit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_server import Server, said, stop
from making_fixtures import RATE, captioned_row, recipe_module, tone, write_lines

from avllm.data.manifest import read_manifest
from avllm.data.media.write import write_wav
from avllm.data.schema import Sample
from avllm.recipes import frame as recipe
from avllm.text_models.base import Answer
from avllm.text_models.judging import rewriting_fault

DOG, RAIN = "A dog barks loudly.", "Rain falls on leaves."
TURNED = "Rain comes down on leaves, and a loudly barking dog is heard last."


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(lambda request, before: (200, said(TURNED)))
    yield server
    stop(server)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Write two captioned sounds."""
    folder = tmp_path / "source"
    folder.mkdir()
    for number in range(2):
        write_wav(
            folder / f"{number}.wav", tone(500.0 + 500 * number, 0.5).astype(np.float32), RATE
        )
    rows = [
        captioned_row(f"s{n}", "audio", f"{n}.wav", caption)
        for n, caption in enumerate((DOG, RAIN))
    ]
    write_lines(folder / "train.jsonl", rows)
    return folder


def composed(
    source: Path, output: Path, **options: Any
) -> tuple[dict[str, Sample], recipe.RecipeReport]:
    """Return the rows by id, and the report."""
    module = recipe_module("compose_audio")
    options = {"rate": RATE, "set_name": "x", **options}
    report = recipe.make(module.ABOUT, module.rows, source, output, name="compose_audio", **options)
    return {s.id: s for s in read_manifest(output / "train.jsonl")}, report


def test_a_text_models_caption_replaces_the_templates(
    source: Path, server: Server, tmp_path: Path
) -> None:
    plain, _ = composed(source, tmp_path / "plain")
    rows, report = composed(source, tmp_path / "out", model=f"{server.url}#m")
    assert report.dropped == {}
    assert list(rows) == list(plain)
    asked = {
        request["messages"][-1]["content"].rpartition("Caption: ")[2] for request in server.requests
    }
    assert asked == {plain[f"x-000000-{tag}-caption"].answer for tag in ("ab", "ba")}
    for name, sample in rows.items():
        before = plain[name]
        if not name.endswith(("ab-caption", "ab-choice", "ba-caption", "ba-choice")):
            assert sample == before
            continue
        template, *others = before.meta["negatives"]
        assert sample.meta["negatives"] == [TURNED, *others]
        assert sample.meta["turned_round_by"] == "text model"
        if before.choices:
            assert sample.choices == [TURNED if c == template else c for c in before.choices]
        assert sample.messages == before.messages
    server.requests.clear()
    again, _ = composed(
        source,
        tmp_path / "again",
        model=f"{server.url}#m",
        answers=str(tmp_path / "out/job/answers"),
    )
    assert (again, server.requests) == (rows, [])


def test_an_answer_that_cannot_be_used_is_dropped_and_the_templates_stays(
    source: Path, server: Server, tmp_path: Path
) -> None:
    server.reply = lambda request, before: (200, said("FAILURE"))
    plain, _ = composed(source, tmp_path / "plain")
    rows, report = composed(source, tmp_path / "out", model=f"{server.url}#m")
    assert rows == plain
    assert report.dropped == {"opposite_refused": 2}


def test_faults_of_a_rewritten_caption() -> None:
    others = ["A dog barks loudly, then rain falls on leaves.", "Rain while dog."]
    for text, reason in {
        TURNED: None,
        "": "empty",
        "Rain falls.\nA dog barks.": "several_lines",
        "I cannot do that.": "refused",
        "a dog barks loudly then rain falls on leaves": "same_as_caption",
        "Rain while dog": "same_as_caption",
        "Rain falls on leaves, then a cat meows.": "other_sounds",
    }.items():
        assert rewriting_fault(Answer(text), others, [DOG, RAIN]) == reason, text
    assert rewriting_fault(Answer(reason="cut_off"), others, [DOG, RAIN]) == "cut_off"
