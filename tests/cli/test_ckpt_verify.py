"""`avllm ckpt verify` names every file that is not as it was saved, and loads the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from answering import make_checkpoint
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from avllm.cli.main import app


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path)


def verify(folder: Path, *options: str) -> tuple[int, dict[str, Any]]:
    result = CliRunner().invoke(app, ["ckpt", "verify", str(folder), *options, "--json"])
    return result.exit_code, json.loads(result.stdout.splitlines()[-1])


def states(found: dict[str, Any]) -> dict[str, str]:
    return {file["name"]: file["state"] for file in found["files"] if file["state"] != "same"}


def test_a_good_checkpoint(checkpoint: Path) -> None:
    code, found = verify(checkpoint)
    assert (code, found["is_good"], found["load_error"]) == (0, True, "")
    assert set(found["backbones"].values()) == {"same"}
    assert {"config.json", "trained.safetensors", "tokenizer.json"} <= {
        f["name"] for f in found["files"]
    }


def test_files_that_were_changed_added_or_lost(checkpoint: Path) -> None:
    (checkpoint / "chat_template.jinja").write_text("x")
    (checkpoint / "added_tokens.json").write_text("{}")
    (checkpoint / "processor_config.json").unlink()
    code, found = verify(checkpoint)
    assert code == 1
    assert states(found) == {
        "chat_template.jinja": "changed",
        "added_tokens.json": "added",
        "processor_config.json": "missing",
    }
    assert found["load_error"] is None


def test_a_change_that_is_accepted(checkpoint: Path) -> None:
    path = checkpoint / "trained.safetensors"
    state = load_file(path)
    name = sorted(state)[0]
    save_file(state | {name: state[name] + 1}, path, metadata={"format": "pt"})
    assert states(verify(checkpoint, "--files-only")[1]) == {"trained.safetensors": "changed"}
    assert verify(checkpoint, "--accept")[0] == 0
    save_file(state | {name: state[name] * float("nan")}, path, metadata={"format": "pt"})
    code, found = verify(checkpoint, "--accept")
    assert code == 1
    assert name in found["load_error"]


def test_a_backbone_that_was_changed(checkpoint: Path) -> None:
    path = next((checkpoint.parent / "backbones" / "llm").glob("*.safetensors"))
    state = load_file(path)
    save_file(
        state | {"lm_head.weight": state["lm_head.weight"] + 1}, path, metadata={"format": "pt"}
    )
    code, found = verify(checkpoint)
    assert code == 1
    assert found["backbones"]["llm"] == "changed or missing"
