"""An LLM's folder is loaded whole or refused: no random numbers, nothing left out."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_llm, make_siglip

from avllm.config_model import LLMConfig
from avllm.encoders.siglip import SigLIP
from avllm.errors import UserError
from avllm.models.llm import load_llm


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llm(tmp_path_factory.mktemp("llm"))


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    shutil.copytree(good, tmp_path / "llm")
    return tmp_path / "llm"


WEIGHT = "model.layers.1.mlp.up_proj.weight"
EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "missing": lambda s: s.pop(WEIGHT),
    "left over": lambda s: s.update(more=torch.zeros(1)),
    "renamed": lambda s: s.update(up=s.pop(WEIGHT)),
    "of another shape": lambda s: s.update({WEIGHT: s[WEIGHT][1:].clone()}),
    "NaN": lambda s: s[WEIGHT].view(-1)[0].fill_(float("nan")),
    "none": dict.clear,
}


@pytest.mark.parametrize("edit", EDITS)
def test_odd_weights_are_refused(folder: Path, edit: str) -> None:
    load_llm(LLMConfig(name=str(folder)))
    state = load_file(folder / "model.safetensors")
    EDITS[edit](state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError) as caught:
        load_llm(LLMConfig(name=str(folder)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_hidden_layers", 10**6), ("num_hidden_layers", 9000), ("hidden_size", 2**24)],
)
def test_a_config_that_asks_for_more_than_the_files_hold_ends_at_once(
    folder: Path, key: str, value: int
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(UserError, match=r"num_hidden_layers|files hold"):
        load_llm(LLMConfig(name=str(folder)))


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_damaged_files_are_one_line(folder: Path, file: str) -> None:
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError) as caught:
        load_llm(LLMConfig(name=str(folder)))
    assert "\n" not in str(caught.value)


class RunsCode:
    """Leave a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_a_pickle_runs_nothing(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(RunsCode(tmp_path / "ran")))
    with pytest.raises(UserError):
        load_llm(LLMConfig(name=str(folder)))
    assert not (tmp_path / "ran").exists()


def test_an_encoder_larger_than_its_files_ends_at_once(tmp_path: Path) -> None:
    folder = make_siglip(tmp_path)
    SigLIP.from_pretrained(str(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 9000}))
    with pytest.raises(UserError, match="files hold"):
        SigLIP.from_pretrained(str(folder))
