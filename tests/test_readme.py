"""What the README shows is there: files, commands, the manifest row, the model section, the Python example."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from avllm.config import DataConfig, ModelConfig, TrainConfig
from avllm.data.schema import Sample

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.split("#")[0].strip()
    for kind, block in BLOCKS
    if kind == "bash"
    for line in block.splitlines()
    if line.split("#")[0].strip()
]


def blocks(kind: str) -> list[str]:
    return [text for k, text in BLOCKS if k == kind]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_files_of_a_command_are_there(command: str) -> None:
    scripts = re.findall(r"(?:scripts|train|serve|data_recipes)/[\w/.-]+", command)
    assert scripts or command.startswith("avllm ")
    for name in scripts:
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("avllm ")])
def test_the_options_of_an_avllm_command_are_known(command: str) -> None:
    words = command.split()[1:]
    depth = 2 if words[0] in ("ckpt", "data") else 1
    call = [sys.executable, "-m", "avllm", *words[:depth], "--help"]
    shown = subprocess.run(call, capture_output=True, text=True, check=True, env=None).stdout
    for option in re.findall(r"--[\w-]+", command):
        assert option in shown, f"{option} is not in the help of {' '.join(words[:depth])}"


def test_linked_files_are_there() -> None:
    for page in ROOT.glob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (ROOT / target).exists(), f"{page.name}: {target}"


def test_the_manifest_row_is_valid() -> None:
    (row,) = blocks("json")
    sample = Sample.model_validate_json(row)
    assert sample.media[0].path == "clips/a.mp4"


def test_the_model_section_is_valid() -> None:
    found = yaml.safe_load(blocks("yaml")[0])
    ModelConfig.model_validate(found["model"])
    assert found["trainable"][-1] == [".*", None]


def test_the_data_section_is_valid() -> None:
    found = yaml.safe_load(blocks("yaml")[1])
    data = DataConfig.model_validate(found["data"])
    assert [source.weight_at(6000) for source in data.train] == [1, 1, 1]
    TrainConfig.model_validate(found["train"])


def test_the_python_example_names_what_exists() -> None:
    (example,) = blocks("python")
    for node in ast.walk(ast.parse(example)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            assert all(hasattr(module, alias.name) for alias in node.names)
