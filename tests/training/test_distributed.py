"""Several processes: the same numbers as one, other modalities on each, and DeepSpeed's two stages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import World, make_world, row, settings, text, write_preset, write_rows
from tiny_runs import difference, free_port, kill_after, losses, run, weights

HOUSE = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
QUIET = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A tiny world for all tests of this file."""
    return make_world(tmp_path_factory.mktemp("world"))


def launch(*command: str, timeout: float) -> str:
    """Run a launcher of the environment's in the repository's root; returns what it printed."""
    environment = {**os.environ, **QUIET, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(HOUSE)}
    done = subprocess.run(
        [str(BIN / command[0]), *command[1:]],
        cwd=HOUSE,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_torchrun_with_two_processes_is_one_with_twice_the_accumulation(world: World, tmp_path: Path) -> None:
    asked = settings(world, tmp_path / "two", data__train=str(world.questions), train__warmup=0)
    preset = str(write_preset(tmp_path / "caption.yaml", asked))
    port = str(free_port())
    command = ("torchrun", "--nproc_per_node", "2", "--master_port", port, "train/stage2_caption.py", preset)
    launch(*command, timeout=240)
    one = run({**asked, "output": str(tmp_path / "one"), "train": {**asked["train"], "accumulate": 2}})
    assert json.loads((tmp_path / "two" / "manifest.json").read_text())["stages"][-1]["processes"] == 2
    assert losses(tmp_path / "two") == pytest.approx(losses(one), abs=1e-6)
    assert difference(weights(tmp_path / "two"), weights(one)) < 1e-6


def test_contrastive_over_two_processes_is_contrastive_over_one(world: World, tmp_path: Path) -> None:
    found = {}
    for ranks, size in ((1, 4), (2, 2)):
        asked = settings(world, tmp_path / str(ranks), "align", train__batch_size=size, train__warmup=0)
        found[ranks] = run(asked, ranks=ranks)
    assert losses(found[1]) == pytest.approx(losses(found[2]), abs=1e-5)
    assert difference(weights(found[1]), weights(found[2])) < 1e-5


@pytest.mark.parametrize("stage", ["align", "caption"])
def test_ranks_with_other_modalities_do_not_hang(world: World, tmp_path: Path, stage: str) -> None:
    clip = str(world.captions.parent / "000.mp4")
    sound = [row(f"sound-{i}", [{"type": "audio", "audio": clip}], "a low sound") for i in range(8)]
    words = [row(f"text-{i}", [text("what colour is it ?")], "red") for i in range(8)]
    broken = [row(f"broken-{i}", [{"type": "video", "video": "gone.mp4"}], "red") for i in range(8)]
    rows = [r for three in zip(sound, words, broken, strict=True) for r in three]
    manifest = str(write_rows(tmp_path / "mixed.jsonl", rows))
    changes = {"data__train": manifest, "data__max_skip_rate": 1.0, "train__batch_size": 1, "train__max_steps": 8}
    found = run(settings(world, tmp_path / "run", stage, **changes), ranks=2)
    assert (found / "trained.safetensors").is_file()


def test_a_killed_run_of_two_processes_goes_on(world: World, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"data__train": str(world.questions), "train__max_steps": 4}
    straight = run(settings(world, tmp_path / "straight", **changes), ranks=2)
    asked = settings(world, tmp_path / "run", **changes, train__save_every=2)
    kill_after(asked, 3, ranks=2)
    assert losses(run(asked, ranks=2)) == losses(straight)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
def test_deepspeed_trains_saves_resumes_and_exports_the_same_weights(world: World, tmp_path: Path, zero: int) -> None:
    changes: dict[str, Any] = {"data__train": str(world.questions), "train__warmup": 0, "train__accumulate": 2}
    asked = settings(world, tmp_path / "zero", **changes, train__save_every=2)
    preset = str(write_preset(tmp_path / "caption.yaml", asked))
    config = f"train/launch/zero{zero}.yaml"
    command = ["accelerate", "launch", "--config_file", config, "--num_processes", "2", "--main_process_port"]
    launch(*command, str(free_port()), "train/stage2_caption.py", preset, timeout=400)
    assert (tmp_path / "zero" / "checkpoints" / "step_4" / "engine").is_dir(), "DeepSpeed's own form"
    plain = run({**asked, "output": str(tmp_path / "plain")}, ranks=2)
    assert losses(tmp_path / "zero") == pytest.approx(losses(plain), abs=1e-5)
    assert difference(weights(tmp_path / "zero"), weights(plain)) < 1e-5
    before = weights(tmp_path / "zero")
    for name in ("finished.json", "trained.safetensors"):
        (tmp_path / "zero" / name).unlink()
    # take the last resume point away: the run has to go on from the one before
    (tmp_path / "zero" / "checkpoints" / "step_4").rename(tmp_path / "away")
    launch(*command, str(free_port()), "train/stage2_caption.py", preset, timeout=400)
    assert difference(weights(tmp_path / "zero"), before) == 0.0
