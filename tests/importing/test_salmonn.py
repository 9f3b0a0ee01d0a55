"""SALMONN's published file becomes norms, a window-level Q-Former, a projection and LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from importing.originals import (
    BEATS,
    Maker,
    State,
    linear,
    make_beats,
    make_qformer,
    norm,
    qformer,
)
from tiny import make_data, make_llm, make_whisper
from torch import Tensor
from typer.testing import CliRunner

from avllm.cli.main import app
from avllm.errors import UserError
from avllm.models.modeling_avllm import AVLLM
from avllm.models.processing_avllm import AVProcessor
from avllm.published import PublishedError

SPEECH = 16  # width of the tiny Whisper
LORA = "llama_model.base_model.model.model.layers.{}.self_attn.{}.lora_{}.default.weight"
DIMS = {"qformer": {"heads": 3}, "lora_alpha": 8}


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backbones")
    make_llm(folder / "llm")
    make_whisper(folder / "whisper")
    torch.save({"cfg": BEATS, "model": make_beats()}, folder / "beats.pt")
    return folder


def make_file(streams: int = 1, lora: bool = True) -> State:
    """`salmonn_v1.pth`; with two streams the second is as wide as the first."""
    make = Maker(12)
    make.norm("ln_speech", SPEECH)
    if streams == 2:
        make.norm("ln_audio", SPEECH)
    make.linear("speech_llama_proj", 24, 32)
    for layer in range(2 if lora else 0):
        for target in ("q_proj", "v_proj"):
            make.draw(LORA.format(layer, target, "A"), 3, 32)
            make.draw(LORA.format(layer, target, "B"), 32, 3)
    windows = make_qformer(
        "speech_Qformer.bert.", "speech_query_tokens", 2, streams * SPEECH, layers=2, every=1
    )
    return make.state | windows


def imported(backbones: Path, folder: Path, state: State, *more: str) -> Path:
    torch.save({"model": state, "optimizer": {"lr": 1.0}}, folder / "salmonn_v1.pth")
    (folder / "dims.json").write_text(json.dumps(DIMS))
    command = ["ckpt", "import", "salmonn", "--ckpt", str(folder / "salmonn_v1.pth")]
    command += ["--whisper", str(backbones / "whisper"), "--llm", str(backbones / "llm")]
    command += ["--output", str(folder / "out"), "--dims", str(folder / "dims.json"), *more]
    result = CliRunner().invoke(app, command)
    if result.exception is not None:
        raise result.exception
    return folder / "out"


def original(state: State, features: list[Tensor]) -> Tensor:
    """SALMONN's tokens of features (B, T, D), T being whole windows of 17 steps."""
    names = ("ln_speech", "ln_audio")
    normed = [norm(state, name, x, 1e-5) for name, x in zip(names, features, strict=False)]
    longest = max(x.shape[1] for x in normed)
    padded = [torch.nn.functional.pad(x, (0, 0, 0, longest - x.shape[1])) for x in normed]
    windows = torch.cat(padded, -1).unflatten(1, (-1, 17))  # (B, W, 17, D)
    read = qformer(
        state, "speech_Qformer.bert.", "speech_query_tokens", windows.flatten(0, 1), heads=3
    )
    read = read.unflatten(0, windows.shape[:2]).flatten(1, 2)
    return linear(state, "speech_llama_proj", read)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(51,), (51, 51), (51, 40)])
def test_windows_are_read_as_in_the_original(
    backbones: Path, tmp_path: Path, lengths: tuple[int, ...]
) -> None:
    state = make_file(len(lengths))
    second = ["--beats", str(backbones / "beats.pt")] if len(lengths) == 2 else []
    folder = imported(backbones, tmp_path, state, *second)
    features = [torch.randn(2, length, SPEECH) for length in lengths]
    golden: dict[str, Any] = {
        name: x.numpy()
        for name, x in zip(("speech_features", "sound_features"), features, strict=False)
    }
    golden["speech_tokens"] = original(state, features).numpy()
    np.savez(tmp_path / "golden.npz", **golden)
    command = ["ckpt", "verify", str(folder), "--golden", str(tmp_path / "golden.npz"), "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    (array,) = json.loads(result.stdout.splitlines()[-1])["arrays"]
    assert array["difference"] < 1e-5


@torch.no_grad()
def test_the_llm_has_the_published_lora(backbones: Path, tmp_path: Path) -> None:
    state = make_file()
    model = AVLLM.from_pretrained(str(imported(backbones, tmp_path, state)))
    own = {n: x for n, x in model.llm.named_parameters() if "lora_" in n}
    assert len(own) == 8
    for name, x in own.items():
        assert torch.equal(x, state[f"llama_model.{name}"])
    layer = model.llm.base_model.model.model.layers[1].self_attn.v_proj
    assert layer.scaling["default"] == 8 / 3
    x = torch.randn(1, 32)
    a, b = (state[LORA.format(1, "v_proj", kind)] for kind in "AB")
    expected = layer.base_layer(x) + x @ a.T @ b.T * 8 / 3
    torch.testing.assert_close(layer(x), expected)


@torch.no_grad()
def test_a_sound_passes_the_whole_model(backbones: Path, tmp_path: Path) -> None:
    folder = imported(backbones, tmp_path, make_file())
    model, processor = AVLLM.from_pretrained(str(folder)), AVProcessor.from_pretrained(folder)
    captions, _ = make_data(tmp_path / "data", 1)
    batch = processor([json.loads(captions.read_text())], root=captions.parent)
    assert model.generate(batch, max_new_tokens=2).shape[0] == 1
    assert model.media_tokens(batch)["speech"].x.shape[2] == 2


def test_every_tensor_is_accounted_for(backbones: Path, tmp_path: Path) -> None:
    state = make_file()
    missing = (LORA.format(1, "v_proj", "A"), "ln_speech.bias", "speech_llama_proj.weight")
    for name in missing:
        less = {key: x for key, x in state.items() if key != name}
        with pytest.raises(PublishedError, match=name.rpartition(".")[0]) as error:
            imported(backbones, tmp_path, less)
        assert error.value.reason == "weights"
    for name in ("llama_model.lm_head.weight", LORA.format(7, "q_proj", "A")):
        with pytest.raises(PublishedError, match="unexpected"):
            imported(backbones, tmp_path, state | {name: torch.ones(3, 32)})
    assert not list(tmp_path.glob("out*"))


def test_beats_is_asked_for_where_the_file_needs_it(backbones: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ln_audio") as error:
        imported(backbones, tmp_path, make_file(2))
    assert error.value.reason == "beats"


@torch.no_grad()
def test_whisper_and_beats_hear_the_same_sound(backbones: Path, tmp_path: Path) -> None:
    """Of one second, Whisper makes 50 tokens and BEATs 7 times 8."""
    folder = imported(backbones, tmp_path, make_file(2), "--beats", str(backbones / "beats.pt"))
    model, processor = AVLLM.from_pretrained(str(folder)), AVProcessor.from_pretrained(folder)
    captions, _ = make_data(tmp_path / "data", 1)
    batch = processor([json.loads(captions.read_text())], root=captions.parent)
    together = model.media_steps(batch)[1]["speech"]
    speech, sounds = together.x[0, :, 0].split([SPEECH, 16], 1)
    assert together.mask.sum() == 56
    assert speech[:50].abs().sum(1).min() > 0
    assert sounds.abs().sum(1).min() > 0
    assert not speech[50:].any()
    assert model.generate(batch, max_new_tokens=2).shape[0] == 1
