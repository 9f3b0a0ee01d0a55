"""Backbones are found from every folder, or where `--backbone` says that they are."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from answering import make_checkpoint
from tiny import make_llm, row, text, write_rows
from typer.testing import CliRunner

from avllm.cli.main import app
from avllm.errors import UserError
from avllm.inference.chat import Chat
from avllm.models.checkpoint_format import CheckpointError, read_backbones, read_manifest_of
from avllm.models.modeling_avllm import AVLLM

ROOT = Path(__file__).resolve().parents[2]
QUESTION = "what colour is it ?"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint whose backbones were moved, and a working directory elsewhere."""
    checkpoint = make_checkpoint(tmp_path / "made")
    (tmp_path / "made" / "backbones").rename(tmp_path / "moved")
    monkeypatch.chdir(ROOT)
    return checkpoint


def backbones_of(run: Path) -> list[str]:
    moved = run.parents[1] / "moved"
    places = {"llm": "llm", "video": "siglip", "encoders.audio": "whisper"}
    options = []
    for part, name in places.items():
        options += ["--backbone", f"{part}={moved / name}"]
    return options


def test_folders_looked_in_are_named(run: Path) -> None:
    with pytest.raises(CheckpointError, match="--backbone llm=FOLDER") as refused:
        AVLLM.from_pretrained(run)
    assert str(run.parent / "backbones" / "llm") in str(refused.value)
    assert refused.value.reason == "backbone"


@pytest.mark.parametrize(
    "command",
    [
        "ask {run} what? --max-new-tokens 2",
        "chat {run}",
        "eval {run} {rows} --max-new-tokens 2 --json",
        "ckpt verify {run}",
    ],
)
def test_every_command_takes_their_folders(command: str, run: Path) -> None:
    rows = write_rows(run.parent / "rows.jsonl", [row("a", [text(QUESTION)], "red")])
    arguments = command.format(run=run, rows=rows).split()
    without = CliRunner().invoke(app, arguments, input="what ?\n")
    assert without.exit_code == 1
    result = CliRunner().invoke(app, [*arguments, *backbones_of(run)], input="what ?\n")
    assert result.exit_code == 0, result.output


def test_the_batch_script_and_the_demo_take_them(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_rows(run.parent / "rows.jsonl", [row("a", [text(QUESTION)], "red")])
    output = run.parent / "answers.jsonl"
    files = ["--input", str(rows), "--output", str(output), "--max-new-tokens", "2"]
    batch = script("batch_infer")
    monkeypatch.setattr(sys, "argv", ["batch_infer", str(run), *files, *backbones_of(run)])
    batch.main()
    assert "answer" in json.loads(output.read_text())
    pytest.importorskip("gradio", reason="gradio is not installed")
    arguments = script("chat_demo").parser().parse_args([str(run), *backbones_of(run)])
    assert len(read_backbones(arguments.backbone)) == 3


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "serve" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_checkpoint_moves_with_its_backbones_or_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    checkpoint = make_checkpoint(Path("made"))  # named by relative paths
    places = {record["place"] for record in read_manifest_of(checkpoint)["backbones"].values()}
    assert places == {"../backbones/llm", "../backbones/siglip", "../backbones/whisper"}
    monkeypatch.chdir(ROOT)
    shutil.copytree(tmp_path / "work" / "made" / "checkpoint", tmp_path / "alone")
    AVLLM.from_pretrained(tmp_path / "alone")
    (tmp_path / "work").rename(tmp_path / "elsewhere")
    AVLLM.from_pretrained(tmp_path / "elsewhere" / "made" / "checkpoint")


def test_a_wrong_folder_is_refused(run: Path, tmp_path: Path) -> None:
    moved = run.parents[1] / "moved"
    others = {"video": str(moved / "siglip"), "audio": str(moved / "whisper")}
    other = make_llm(tmp_path / "other", initializer_range=0.5)
    for places in (
        {"llm": str(tmp_path / "none")},
        {"llm": str(other)},
        {"smell": str(moved / "llm")},
    ):
        with pytest.raises(CheckpointError) as refused:
            Chat.load(run, backbones=others | places)
        assert refused.value.reason == "backbone"
    for text_of_option in ("llm", "=x", "llm="):
        with pytest.raises(UserError, match="PART=FOLDER"):
            read_backbones([text_of_option])
