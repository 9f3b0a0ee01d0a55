"""What a model cannot use of a file is said, or refused; nothing is answered as if it were seen."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from answering import make_checkpoint
from tiny import row, text, write_rows
from typer.testing import CliRunner

from avllm.cli.main import app
from avllm.data.schema import RowError, Sample
from avllm.errors import UserError
from avllm.evaluation.command import run_eval
from avllm.inference.batch import answer_samples
from avllm.inference.chat import Chat
from avllm.inference.drawing import facts
from avllm.inference.visits import growing_answer

QUESTION = "what colour is it ?"


@pytest.fixture(scope="module", params=["audio", "video"])
def has(request: pytest.FixtureRequest) -> str:
    """The only medium that a model has an encoder for."""
    return str(request.param)


@pytest.fixture(scope="module")
def lacks(has: str) -> str:
    return "video" if has == "audio" else "audio"


@pytest.fixture(scope="module")
def folder(has: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp(has), [has])


@pytest.fixture
def chat(folder: Path) -> Chat:
    return Chat.load(folder)


def asked(clip: Path, **options: Any) -> Sample:
    return Sample.model_validate(
        row("a", [{"type": "video", "video": str(clip), **options}, text(QUESTION)], "red")
    )


def test_a_chat_names_it(chat: Chat, lacks: str, clips: list[Path]) -> None:
    assert "".join(chat.ask(QUESTION, video=clips[0], max_new_tokens=4))
    (warning,) = chat.warnings
    assert warning.startswith(f"the {lacks} of {clips[0].name}")
    (view,) = chat.look(video=clips[0])
    assert view.warnings == (warning,)
    assert "no" in facts(view)
    shown = list(growing_answer(chat, "and ?", {"max_new_tokens": 4}))[-1]
    assert warning in shown
    chat.clear()
    list(chat.ask(QUESTION, max_new_tokens=2))
    assert chat.warnings == []


def test_a_batch_names_it_beside_the_answer(chat: Chat, lacks: str, clips: list[Path]) -> None:
    samples = [asked(clips[0]), Sample.model_validate(row("b", [text(QUESTION)], "red"))]
    one, other = answer_samples(chat.model, chat.processor, samples)
    assert one["answer"]
    assert [lacks in warning for warning in one["warnings"]] == [True]
    assert set(other) == {"id", "answer"}


def test_strict_refuses_it(chat: Chat, lacks: str, clips: list[Path]) -> None:
    chat.processor.strict = True
    with pytest.raises(RowError, match=lacks) as refused:
        chat.ask(QUESTION, video=clips[0])
    assert refused.value.reason == "no_encoder"
    (answer,) = answer_samples(chat.model, chat.processor, [asked(clips[0])])
    assert "no_encoder" in answer["error"]


def test_the_command_warns_and_with_strict_fails(
    folder: Path, lacks: str, clips: list[Path]
) -> None:
    command = ["ask", str(folder), "--video", str(clips[0]), QUESTION, "--max-new-tokens", "2"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0
    assert result.stderr.startswith(f"warning: the {lacks} of {clips[0].name}")
    result = CliRunner().invoke(app, [*command, "--strict"])
    assert isinstance(result.exception, RowError)


def test_the_processor_warns(
    chat: Chat, lacks: str, clips: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("avllm").propagate = True
    chat.processor([asked(clips[0])])
    assert f"row a: the {lacks} of {clips[0].name}" in caplog.text


def test_an_evaluation_counts_it_and_with_strict_stops(
    folder: Path, lacks: str, clips: list[Path], tmp_path: Path
) -> None:
    rows = [asked(clips[0]).model_dump(mode="json", exclude_none=True)]
    rows.append(row("b", [text(QUESTION)], "red"))
    manifest = write_rows(tmp_path / "rows.jsonl", rows)
    figures = run_eval(folder, manifest, max_new_tokens=2)
    assert figures["left_out"] == {lacks: 1}
    with pytest.raises(UserError, match="1 of 2 rows") as refused:
        run_eval(folder, manifest, strict=True)
    assert refused.value.reason == "no_encoder"
    json.dumps(figures)


def test_what_a_row_does_not_mean_is_not_named(chat: Chat, has: str, clips: list[Path]) -> None:
    mute = asked(clips[1])  # without a sound track
    silenced = asked(clips[0], sound="off")
    heard = Sample.model_validate(
        row("c", [{"type": "audio", "audio": str(clips[0])}, text(QUESTION)], "red")
    )
    answers = list(answer_samples(chat.model, chat.processor, [mute, silenced, heard]))
    assert all("warnings" not in answer for answer in answers)
    expected = [False, False, True] if has == "video" else [True, True, False]
    assert ["error" in answer for answer in answers] == expected  # nothing of them is usable


def test_a_model_of_both_names_nothing(checkpoint: Path, clips: list[Path]) -> None:
    chat = Chat.load(checkpoint, strict=True)
    assert "".join(chat.ask(QUESTION, video=clips, max_new_tokens=2))
    assert chat.warnings == []
