"""`avllm train`: the stages of presets one after the other, finished ones passed over."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import World, make_world, settings, write_preset
from tiny_runs import weights
from typer.testing import CliRunner

from avllm.cli.main import app
from avllm.config_errors import ConfigError
from avllm.training.stage_script import read_presets

INVOKE = CliRunner().invoke


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), clips=4)


@pytest.fixture
def presets(world: World, tmp_path: Path) -> Path:
    """A folder of two stages of two steps."""
    folder = tmp_path / "presets"
    folder.mkdir()
    first = settings(world, tmp_path / "one", "align", train__max_steps=2)
    second = settings(world, tmp_path / "two", train__max_steps=2, init=str(tmp_path / "one"))
    second["init_from_scratch"] = False
    del second["model"]
    write_preset(folder / "stage1_align.yaml", first)
    write_preset(folder / "stage2_caption.yaml", second)
    return folder


def test_the_stages_of_a_folder_train_one_after_the_other(presets: Path, tmp_path: Path) -> None:
    done = INVOKE(app, ["train", str(presets), "train.max_steps=1"], catch_exceptions=False)
    assert done.stdout.splitlines() == [str(tmp_path / "one"), str(tmp_path / "two")]
    first, second = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert first.keys() == second.keys()
    assert any(not torch.equal(first[name], second[name]) for name in first)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/trained.safetensors")}
    again = INVOKE(app, ["train", str(presets), "train.max_steps=1"], catch_exceptions=False)
    assert again.stdout == done.stdout
    assert {path: path.stat().st_mtime_ns for path in written} == written  # nothing to do


def test_overrides_reach_the_stages_that_they_are_meant_for(presets: Path) -> None:
    words = [str(presets), "seed=3", "align.train.max_steps=7", "model.llm.dtype=bfloat16"]
    first, second = [preset.config for preset in read_presets(words)]
    assert (first.seed, first.train.max_steps) == (3, 7)
    assert (second.seed, second.train.max_steps) == (3, 2)
    assert first.model is not None
    assert first.model.llm.dtype == "bfloat16"
    (only,) = read_presets([str(presets), "output=elsewhere"], only=["align"])
    assert only.config.output == "elsewhere"
    words = [str(presets), "align.train.max_steps=5", "align.output=elsewhere"]
    (only,) = read_presets(words, only=["align"])
    assert (only.config.train.max_steps, only.config.output) == (5, "elsewhere")
    files = [str(presets / "stage1_align.yaml"), str(presets / "stage2_caption.yaml")]
    assert [preset.config.stage for preset in read_presets(files)] == ["align", "caption"]


@pytest.mark.parametrize(
    "words, only, named",
    [
        (["output=x"], [], "align.output=x"),
        (["caption.train.max_step=1"], [], "'max_steps'"),
        (["align.output=elsewhere"], [], "stage2_caption.yaml line .*init.*elsewhere"),
        ([], ["prefer"], "prefer.*align"),
        (["prefer.train.max_steps=1"], [], "stage prefer"),
        (["align.train.max_steps=1"], ["caption"], "stage align"),
    ],
)
def test_what_no_stage_can_follow_is_refused_before_the_first_trains(
    presets: Path, words: list[str], only: list[str], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        read_presets([str(presets), *words], only)


def test_a_stage_may_start_from_the_best_of_the_one_before(
    presets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [str(presets), "align.output=one", f"caption.init={tmp_path / 'one' / 'best'}"]
    assert [preset.config.init for preset in read_presets(words)] == [
        None,
        str(tmp_path / "one" / "best"),
    ]


def test_a_folder_without_presets_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=str(tmp_path)):
        read_presets([str(tmp_path)])
    with pytest.raises(ConfigError, match="no preset"):
        read_presets(["seed=1"])
