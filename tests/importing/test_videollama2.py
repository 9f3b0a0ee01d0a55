"""VideoLLaMA2's published connector becomes adapter `stc` with the same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from importing.originals import State, make_stc, stc
from tiny import make_data, make_llm
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel
from typer.testing import CliRunner

from avllm.cli.main import app
from avllm.errors import UserError
from avllm.models.modeling_avllm import AVLLM
from avllm.models.processing_avllm import AVProcessor


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backbones")
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = CLIPVisionConfig(hidden_size=12, image_size=32, patch_size=8, **sizes)
    CLIPVisionModel(config).save_pretrained(folder / "clip")
    size = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder / "clip")
    make_llm(folder / "llm")
    return folder


def imported(
    backbones: Path, folder: Path, state: State, vision: str = "clip", **dims: Any
) -> Path:
    torch.save(state, folder / "mm_projector.bin")
    (folder / "dims.json").write_text(json.dumps(dims))
    command = ["ckpt", "import", "videollama2", "--projector", str(folder / "mm_projector.bin")]
    command += ["--vision", str(backbones / vision), "--llm", str(backbones / "llm")]
    command += ["--output", str(folder / "out"), "--dims", str(folder / "dims.json")]
    result = CliRunner().invoke(app, command)
    if result.exception is not None:
        raise result.exception
    return folder / "out"


@torch.no_grad()
@pytest.mark.parametrize(("padding", "frames"), [(1, 4), (1, 5), (0, 4)])
def test_the_connector_is_the_originals(
    backbones: Path, tmp_path: Path, padding: int, frames: int
) -> None:
    state = make_stc()
    folder = imported(backbones, tmp_path, state, padding=padding)
    x = torch.randn(2, frames, 16, 12)
    expected = stc(state, x, padding)
    np.savez(tmp_path / "golden.npz", frame_features=x.numpy(), video_tokens=expected.numpy())
    command = ["ckpt", "verify", str(folder), "--golden", str(tmp_path / "golden.npz"), "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    (array,) = json.loads(result.stdout.splitlines()[-1])["arrays"]
    assert array["difference"] < 1e-5


@torch.no_grad()
def test_a_clip_passes_the_whole_model(backbones: Path, tmp_path: Path) -> None:
    folder = imported(backbones, tmp_path, make_stc(), frames=4)
    model, processor = AVLLM.from_pretrained(str(folder)), AVProcessor.from_pretrained(folder)
    captions, _ = make_data(tmp_path / "data", 1)
    batch = processor([json.loads(captions.read_text())], root=captions.parent)
    assert model.encoders["video"].layers == [-2]
    assert model.generate(batch, max_new_tokens=2).shape[0] == 1


def test_every_tensor_is_accounted_for(backbones: Path, tmp_path: Path) -> None:
    state = make_stc()
    name = "model.mm_projector.s2.b2.se.fc2.bias"
    missing = {key: x for key, x in state.items() if key != name}
    for wrong, word in ((missing, "se.fc2.bias"), (state | {"model.x": torch.ones(1)}, "model.x")):
        with pytest.raises(UserError, match=word) as error:
            imported(backbones, tmp_path, wrong)
        assert error.value.reason == "weights"
    with pytest.raises(UserError, match="readout"):
        imported(backbones, tmp_path, {"x": torch.ones(1)})
    with pytest.raises(UserError, match="depth"):
        imported(backbones, tmp_path, state, depth=3)


def test_another_vision_tower_is_refused(backbones: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="llama"):
        imported(backbones, tmp_path, make_stc(), "llm")
