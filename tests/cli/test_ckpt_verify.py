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
from avllm.errors import UserError


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
    # What does not load is not recorded: the right file is still the right one.
    assert states(verify(checkpoint, "--files-only")[1]) == {"trained.safetensors": "changed"}
    save_file(state | {name: state[name] + 1}, path, metadata={"format": "pt"})
    assert verify(checkpoint)[0] == 0


def test_a_backbone_that_was_changed(checkpoint: Path) -> None:
    path = next((checkpoint.parent / "backbones" / "llm").glob("*.safetensors"))
    state = load_file(path)
    save_file(
        state | {"lm_head.weight": state["lm_head.weight"] + 1}, path, metadata={"format": "pt"}
    )
    code, found = verify(checkpoint)
    assert code == 1
    assert found["backbones"]["llm"] == "changed or missing"


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garble(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 2)


def begin_otherwise(path: Path) -> None:
    path.write_bytes(b"[" + path.read_bytes()[1:])


def nest(path: Path) -> None:
    path.write_text("[" * 100_000)


def blank(path: Path) -> None:
    """Replace each value of a JSON object by null, at the top and below."""
    if path.suffix != ".json":
        path.write_text("{}")
        return
    content = json.loads(path.read_text())
    for key, value in content.items():
        content[key] = dict.fromkeys(value) if isinstance(value, dict) else None
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("damage", [Path.unlink, empty, cut, garble, begin_otherwise, nest, blank])
def test_damage_of_any_file_is_one_line(checkpoint: Path, damage: Any) -> None:
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        content = path.read_bytes()
        damage(path)
        for command in (["inspect"], ["verify"], ["verify", "--accept"]):
            result = CliRunner().invoke(app, ["ckpt", *command, str(checkpoint)])
            assert result.exception is None or isinstance(
                result.exception, UserError | OSError | SystemExit
            ), f"{command} {path.name}: {result.exception!r}"
            if isinstance(result.exception, UserError):
                assert "\n" not in str(result.exception)
            if command == ["verify"]:
                assert result.exit_code == 1
        path.write_bytes(content)
        assert verify(checkpoint, "--files-only", "--accept")[0] == 0


@pytest.mark.parametrize(
    "field, value",
    [
        ("backbones", {"llm": {"sha256": 3}}),
        ("backbones", {"llm": {"name": "a\0b", "sha256": "x"}}),
        ("backbones", {"llm": {}}),
        ("stages", [{"stage": "align", "data": ["a.jsonl"]}]),
        ("stages", [{"stage": 3}]),
        ("stages", [{}]),
        ("files", ["config.json"]),
        ("files", {"config.json": None}),
        ("format", None),
    ],
)
def test_a_manifest_of_another_form_is_one_line(checkpoint: Path, field: str, value: Any) -> None:
    path = checkpoint / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    for command in (["inspect"], ["verify", "--files-only"]):
        result = CliRunner().invoke(app, ["ckpt", *command, str(checkpoint)])
        assert result.exception is None or isinstance(result.exception, UserError | SystemExit)
