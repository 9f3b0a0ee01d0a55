"""The stage scripts from the command line: a mistake is one line, before a model is loaded."""

from __future__ import annotations

import copy
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import World, make_world, settings, write_preset

from avllm.models.modeling_avllm import AVLLM

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), clips=4)


def started(script: str, *arguments: str) -> int:
    """Run a script of train/ in this process; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "train" / script), run_name="__main__")
    return int(ended.value.code or 0)


@pytest.mark.parametrize(
    "script, override, message",
    [
        (
            "stage1_align.py",
            "seed=0",
            "is a preset of stage caption; this script trains stage align",
        ),
        (
            "stage4_prefer.py",
            "seed=0",
            "is a preset of stage caption; this script trains stage prefer",
        ),
        (
            "stage2_caption.py",
            "train.max_step=1",
            "unknown key train.max_step; did you mean 'max_steps'?",
        ),
        (
            "stage2_caption.py",
            "init_from_scratch=false",
            "starts from a finished align run, but no init is given",
        ),
        (
            "stage2_caption.py",
            "data.train=absent.jsonl",
            "absent.jsonl is not a file; expected a manifest",
        ),
        (
            "stage2_caption.py",
            "data.validation=absent.jsonl",
            "absent.jsonl is not a file; expected a manifest",
        ),
        ("stage2_caption.py", "objectives.0.type=next_tokn", "did you mean 'next_token'?"),
        ("stage2_caption.py", "objectives.0.heat=2", "objective 'next_token' has no option 'heat'"),
        ("stage2_caption.py", "model.encoders.audio.type=wisper", "did you mean 'whisper'?"),
        (
            "stage2_caption.py",
            "model.encoders.audio.window=long",
            "'whisper': window is 'long'; input should be a valid",
        ),
        (
            "stage2_caption.py",
            "model.connector.0.detph=2",
            "'mlp' has no option 'detph'; did you mean 'depth'?",
        ),
        (
            "stage2_caption.py",
            "model.connector.0.depth=two",
            "'mlp': depth is 'two'; input should be a valid integer",
        ),
        (
            "stage2_caption.py",
            "model.layout.type=concatt",
            "unknown layout 'concatt'; did you mean 'concat'?",
        ),
        (
            "stage2_caption.py",
            "train.trackers=[abacus]",
            "there is no tracker 'abacus'",
        ),
    ],
)
def test_a_mistake_is_one_line_and_costs_no_loading(
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    override: str,
    message: str,
) -> None:
    monkeypatch.setattr(
        AVLLM, "from_backbones", lambda *_: pytest.fail("the model was loaded first")
    )
    preset = write_preset(tmp_path / "preset.yaml", settings(world, tmp_path / "run"))
    assert started(script, str(preset), override) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "override, message",
    [
        (
            "model.llm.name=/nowhere/llm",
            "/nowhere/llm is not here; expected a folder with a model, or a name on",
        ),
        (
            "model.encoders.video.name=/nowhere/eye",
            "the video encoder (siglip): /nowhere/eye is not here",
        ),
        ("model.encoders.audio.type=ast", "the audio encoder (ast)"),
        ("model.encoders.audio.window=99", "Whisper: window=99 s; expected from 0.02 to 1 s"),
        (
            "model.connector.0.depth=0",
            "connector[0] (mlp): mlp on 'video' has depth 0; expected at least 1",
        ),
        (
            "trainable=[[^nothing, 1e-3], [.*, null]]",
            "the rule '^nothing' of `trainable` matches no parameter",
        ),
    ],
)
def test_what_shows_while_the_model_is_made_is_one_line_too(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    preset = write_preset(tmp_path / "preset.yaml", settings(world, tmp_path / "run"))
    assert started("stage2_caption.py", str(preset), override) == 1
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in said
    assert said.startswith(f"error: {preset}")
    assert said.endswith("given on the command line]")


@pytest.mark.parametrize(
    "changes, key, message",
    [
        ({"objectives": [{"type": "contrastive", "pairs": ["smell-text"]}]}, "objectives", "smell"),
        ({"trainable": [["^connector", 1e-3]]}, "trainable", "no rule of `trainable` matches"),
        ({"data__quarantine": ["absent.txt"]}, "data", "absent.txt is not a file"),
        ({"train__trackers": ["abacus"]}, "trackers", "no tracker 'abacus'"),
        ({"train__best_by": "next_token/hits"}, "best_by", "data.validation"),
        ({"model__connector": [{"type": "mlp", "stream": "video"}]}, "connector", "ends with"),
        ({"data__train": ["absent.jsonl"]}, "train", "absent.jsonl is not a file"),
    ],
)
def test_a_mistake_in_a_preset_names_its_line(
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    key: str,
    message: str,
) -> None:
    asked = copy.deepcopy(settings(world, tmp_path / "run", **changes))
    preset = write_preset(tmp_path / "preset.yaml", asked)
    lines = preset.read_text().splitlines()
    assert started("stage2_caption.py", str(preset)) == 1
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in said
    named = re.match(rf"error: {preset} line (\d+): ", said)
    assert named is not None, said
    near = "\n".join(lines[max(0, int(named[1]) - 2) : int(named[1])])
    assert f"{key}:" in near
