"""Several processes: the same numbers as one, DeepSpeed's two stages, FSDP."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, set_seed
from objectives.qformer_models import TERMS, connector
from tiny import World, make_world, row, settings, text, write_preset, write_rows
from tiny_runs import (
    TIMEOUT,
    difference,
    free_port,
    kill_after,
    launcher_variables,
    losses,
    rows,
    run,
    together,
    train,
    weights,
)
from torch.distributed.fsdp import FSDPModule

from avllm.config import RunConfig
from avllm.data.loader import Cut, MicroBatches, Order
from avllm.data.mixture import order_of
from avllm.training.accelerator import make_accelerator, precision_of
from avllm.training.points.begin import begin
from avllm.training.progress import StopRequest
from avllm.training.start import build_datasets, build_parts, padding
from avllm.training.trainer import Trainer

HOUSE = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
NINJA = str(BIN / "ninja") if (BIN / "ninja").exists() else "ninja"
QUIET = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A tiny world for all tests of this file."""
    return make_world(tmp_path_factory.mktemp("world"))


def launch(*command: str) -> str:
    """Run a launcher of the environment's in the repository's root; returns what it printed."""
    environment = {
        **os.environ,
        **QUIET,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(HOUSE),
    }
    done = subprocess.run(
        [str(BIN / command[0]), *command[1:]],
        cwd=HOUSE,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_torchrun_with_two_processes_is_one_with_twice_the_accumulation(
    world: World, tmp_path: Path
) -> None:
    asked = settings(world, tmp_path / "two", data__train=str(world.questions), train__warmup=0)
    preset = str(write_preset(tmp_path / "caption.yaml", asked))
    port = str(free_port())
    command = (
        "torchrun",
        "--nproc_per_node",
        "2",
        "--master_port",
        port,
        "train/stage2_caption.py",
        preset,
    )
    launch(*command)
    one = run(
        {**asked, "output": str(tmp_path / "one"), "train": {**asked["train"], "accumulate": 2}}
    )
    assert (
        json.loads((tmp_path / "two" / "manifest.json").read_text())["stages"][-1]["processes"] == 2
    )
    assert losses(tmp_path / "two") == pytest.approx(losses(one), abs=1e-6)
    assert difference(weights(tmp_path / "two"), weights(one)) < 1e-6


BUDGET = {"train__batch_size": 3, "train__max_tokens": 100, "data__max_length": 100}


def under_a_budget(world: World, output: Path, **changes: Any) -> dict[str, Any]:
    """Two micro batches of three questions a step, each cut by a budget of tokens."""
    questions = {"data__train": str(world.questions), "train__warmup": 0, "train__accumulate": 2}
    return settings(world, output, **questions, **BUDGET, **changes)


def micro_steps(asked: dict[str, Any]) -> list[list[int]]:
    """How many micro batches each of two ranks has in each step, before they are evened out."""
    config = RunConfig.model_validate(asked)
    parts, train_ = build_parts(config), config.train
    dataset, collate = (
        build_datasets(config, parts)[0],
        padding(parts, blanks=True, max_tokens=train_.max_tokens),
    )
    order = order_of(config, dataset.items, 2)
    found = []
    for rank in range(2):
        batches = MicroBatches(
            order, Cut(train_.batch_size, train_.accumulate, 2, rank), 0, train_.max_steps or 0
        )
        counts = [len(collate([dataset[entry] for entry in batch])) for batch in batches]
        found.append(
            [
                sum(counts[n : n + train_.accumulate])
                for n in range(0, len(counts), train_.accumulate)
            ]
        )
    return found


@pytest.fixture(scope="module")
def unlimited(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of the same rows without a budget."""
    asked = under_a_budget(world, tmp_path_factory.mktemp("unlimited") / "run")
    asked["train"] |= {"max_tokens": None, "batch_size": 12, "accumulate": 1}
    return run(asked)


def test_processes_that_a_budget_of_tokens_gives_other_numbers_of_micro_batches(
    world: World, unlimited: Path, tmp_path: Path
) -> None:
    asked = under_a_budget(world, tmp_path / "cut")
    one, other = micro_steps(asked)
    assert any(a != b for a, b in zip(one, other, strict=True)), "else nothing is evened out"
    cut = run(asked, ranks=2)
    assert losses(cut) == pytest.approx(losses(unlimited), abs=1e-6)
    assert difference(weights(cut), weights(unlimited)) < 1e-6


def test_stages_that_share_a_process_group_are_stages_by_themselves(
    world: World, tmp_path: Path
) -> None:
    first = settings(world, tmp_path / "align", "align")
    second = settings(
        world, tmp_path / "caption", init=str(tmp_path / "align"), init_from_scratch=False
    )
    del second["model"]
    presets = [
        str(write_preset(tmp_path / f"{n}.yaml", s))
        for n, s in (("align", first), ("caption", second))
    ]
    port, times = str(free_port()), tmp_path / "seconds.json"
    command = (
        "torchrun",
        "--nproc_per_node",
        "2",
        "--master_port",
        port,
        "scripts/toy_world/train.py",
        str(times),
    )
    launch(*command, *presets)
    assert set(json.loads(times.read_text())) == {"align", "caption"}
    alone = run({**second, "output": str(tmp_path / "alone")}, ranks=2)
    assert losses(tmp_path / "caption") == losses(alone)
    assert difference(weights(tmp_path / "caption"), weights(alone)) == 0


@pytest.mark.parametrize(
    ("optimizer", "close"), [("adamw", 1e-5), ("muon", 1e-3)]
)  # muon's steps are bfloat16
def test_contrastive_over_two_processes_is_contrastive_over_one(
    world: World, tmp_path: Path, optimizer: str, close: float
) -> None:
    found = {}
    for ranks, size in ((1, 4), (2, 2)):
        changes = {"train__batch_size": size, "train__warmup": 0, "train__optimizer": optimizer}
        found[ranks] = run(settings(world, tmp_path / str(ranks), "align", **changes), ranks=ranks)
    assert losses(found[1]) == pytest.approx(losses(found[2]), abs=close)
    assert difference(weights(found[1]), weights(found[2])) < close


def test_what_no_objective_reads_keeps_no_process_waiting(world: World, tmp_path: Path) -> None:
    """The connector trains for sound, too, which a pair of video and text does not read."""
    found = {}
    for ranks, size in ((1, 4), (2, 2)):
        asked = settings(
            world, tmp_path / str(ranks), "align", train__batch_size=size, train__warmup=0
        )
        asked["objectives"][0]["pairs"] = ["video-text"]
        found[ranks] = run(asked, ranks=ranks)
    assert losses(found[1]) == pytest.approx(losses(found[2]), abs=1e-5)
    assert difference(weights(found[1]), weights(found[2])) < 1e-5


def pinned(world: World, path: Path, batch_size: int, steps: int = 3, media: str = "audio") -> Path:
    """A manifest whose seeded order gives rank 0 of two no video (or sound), rank 1 only text."""
    clip = str(world.captions.parent / "000.mp4")
    count = 2 * batch_size * steps
    order = Order([count], [1.0], seed=0)
    rows: list[dict[str, Any]] = [{}] * count
    for place, item in enumerate(order.items(0, count)):
        pitch = ("low", "high")[place % 2]
        if place // batch_size % 2:
            rows[item] = row(f"text-{item}", [text("what colour is it ?")], "red")
        else:
            rows[item] = row(f"sound-{item}", [{"type": media, media: clip}], f"a {pitch} sound")
    for rank, kind in enumerate(("sound", "text")):
        for batch in MicroBatches(order, Cut(batch_size, 1, 2, rank), 0, steps):
            assert all(rows[item]["id"].startswith(kind) for item, _ in batch)
    return write_rows(path, rows)


@pytest.mark.parametrize("stage", ["align", "caption"])
def test_one_rank_all_sound_and_one_all_text_is_one_process_with_both(
    world: World, tmp_path: Path, stage: str
) -> None:
    manifest = str(pinned(world, tmp_path / "mixed.jsonl", batch_size=2))
    asked = settings(
        world, tmp_path / "two", stage, data__train=manifest, train__max_steps=3, train__warmup=0
    )
    two = run(asked, ranks=2)
    one = run(
        {**asked, "output": str(tmp_path / "one"), "train": {**asked["train"], "batch_size": 4}}
    )
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    assert difference(weights(two), weights(one)) < 1e-5
    assert rows(two)[0]["grad_norm"] > 0


@pytest.mark.parametrize("stage", ["align", "caption"])
def test_ranks_with_nothing_but_broken_rows_do_not_hang(
    world: World, tmp_path: Path, stage: str
) -> None:
    good = [json.loads(line) for line in world.captions.read_text().splitlines()][:4]
    for sample in good:
        part = sample["messages"][0]["content"][0]
        part["video"] = str(world.captions.parent / part["video"])
    broken = [row(f"broken-{i}", [{"type": "video", "video": "gone.mp4"}], "red") for i in range(8)]
    manifest = str(write_rows(tmp_path / "mixed.jsonl", good + broken))
    changes = {
        "data__train": manifest,
        "data__max_skip_rate": 1.0,
        "train__batch_size": 1,
        "train__max_steps": 6,
    }
    found = run(settings(world, tmp_path / "run", stage, **changes), ranks=2)
    assert len((found / "skipped.jsonl").read_text().splitlines()) == 8


def test_steps_of_text_alone_are_the_same_in_one_process(world: World, tmp_path: Path) -> None:
    """Before a frozen LLM they have no gradient at all; a broken row may stand in them, too."""
    good = [json.loads(line) for line in world.captions.read_text().splitlines()][:4]
    for sample in good:
        part = sample["messages"][0]["content"][0]
        part["video"] = str(world.captions.parent / part["video"])
    words = [row(f"text-{i}", [text("what colour is it ?")], "red") for i in range(7)]
    broken = row("broken", [{"type": "video", "video": "gone.mp4"}], "red")
    manifest = str(write_rows(tmp_path / "mixed.jsonl", [*good, *words, broken]))
    changes = {
        "data__train": manifest,
        "data__max_skip_rate": 1.0,
        "train__batch_size": 1,
        "train__max_steps": 6,
    }
    asked = settings(
        world, tmp_path / "one", **changes, train__accumulate=2, train__weight_decay=0.1
    )
    one = run(asked)
    assert 0.0 in [r["grad_norm"] for r in rows(one)]  # a step without media is among them
    two = run(
        {**asked, "output": str(tmp_path / "two"), "train": {**asked["train"], "accumulate": 1}},
        ranks=2,
    )
    assert losses(one) == pytest.approx(losses(two), abs=1e-5)
    assert difference(weights(one), weights(two)) < 1e-5


def test_a_killed_run_of_two_processes_goes_on(world: World, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"data__train": str(world.questions), "train__max_steps": 4}
    straight = run(settings(world, tmp_path / "straight", **changes), ranks=2)
    asked = settings(world, tmp_path / "run", **changes, train__save_every=2)
    kill_after(asked, 3, ranks=2)
    assert losses(run(asked, ranks=2)) == losses(straight)


@pytest.fixture(scope="module")
def plain(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What plain data parallelism makes of the settings that the DeepSpeed runs have."""
    return run(accumulated(world, tmp_path_factory.mktemp("plain") / "run"), ranks=2)


def accumulated(world: World, output: Path) -> dict[str, Any]:
    """Four steps of two micro-steps, a resume point after two."""
    changes: dict[str, Any] = {
        "data__train": str(world.questions),
        "train__warmup": 0,
        "train__accumulate": 2,
    }
    return settings(world, output, **changes, train__save_every=2)


def run_deepspeed(asked: dict[str, Any], config_file: str) -> Path:
    """Train a stage in two processes that believe to be started by `accelerate launch`."""
    launcher = launcher_variables(HOUSE / "train" / "launch" / config_file, processes=2)
    together(train_over_gloo, asked, launcher=launcher)
    return Path(asked["output"])


def train_over_gloo(asked: dict[str, Any]) -> None:
    """Train without DeepSpeed's shared-memory extension, whose compilation takes a minute."""
    from deepspeed import ops

    ops.__compatible_ops__["deepspeed_shm_comm"] = False
    train(asked)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
def test_deepspeed_trains_saves_resumes_and_exports_the_same_weights(
    world: World, plain: Path, tmp_path: Path, zero: int
) -> None:
    asked = accumulated(world, tmp_path / "zero")
    found = run_deepspeed(asked, f"zero{zero}.yaml")
    assert (found / "checkpoints" / "step_4" / "engine").is_dir(), "DeepSpeed's own form"
    assert losses(found) == pytest.approx(losses(plain), abs=1e-5)
    assert [r["grad_norm"] for r in rows(found)] == pytest.approx(
        [r["grad_norm"] for r in rows(plain)], rel=1e-3
    )
    assert difference(weights(found), weights(plain)) < 1e-5
    before = weights(found)
    for name in ("finished.json", "trained.safetensors"):
        (found / name).unlink()
    # take the last resume point away: the run has to go on from the one before
    (found / "checkpoints" / "step_4").rename(tmp_path / "away")
    run_deepspeed(asked, f"zero{zero}.yaml")
    assert difference(weights(found), before) == 0.0


@pytest.mark.slow
def test_other_modalities_on_each_rank_under_zero3(world: World, tmp_path: Path) -> None:
    manifest = str(pinned(world, tmp_path / "mixed.jsonl", batch_size=1, steps=2))
    changes = {
        "data__train": manifest,
        "train__batch_size": 1,
        "train__max_steps": 2,
        "train__warmup": 0,
    }
    asked = settings(world, tmp_path / "two", **changes)
    two = run_deepspeed(asked, "zero3.yaml")
    one = run(
        {**asked, "output": str(tmp_path / "one"), "train": {**asked["train"], "batch_size": 2}}
    )
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    assert difference(weights(two), weights(one)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
def test_a_budget_of_tokens_under_deepspeed_is_one_process_without(
    world: World, unlimited: Path, tmp_path: Path, zero: int
) -> None:
    """Ranks have other numbers of micro-steps than DeepSpeed expects, and validate in between."""
    changes = {"data__validation": str(world.captions), "train__validate_every": 2}
    cut = run_deepspeed(under_a_budget(world, tmp_path / "cut", **changes), f"zero{zero}.yaml")
    assert losses(cut) == pytest.approx(losses(unlimited), abs=1e-5)
    assert [r["grad_norm"] for r in rows(cut)] == pytest.approx(
        [r["grad_norm"] for r in rows(unlimited)], rel=1e-3
    )
    assert difference(weights(cut), weights(unlimited)) < 1e-5


@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(shutil.which, ("g++", NINJA))), reason="DeepSpeed needs g++ and ninja on CPUs"
)
def test_accelerate_launch_starts_deepspeed(world: World, plain: Path, tmp_path: Path) -> None:
    """The first one on a machine compiles DeepSpeed's extension: about a minute of it."""
    preset = str(write_preset(tmp_path / "zero2.yaml", accumulated(world, tmp_path / "run")))
    command = (
        "accelerate",
        "launch",
        "--config_file",
        "train/launch/zero2.yaml",
        "--num_processes",
        "2",
    )
    launch(*command, "--main_process_port", str(free_port()), "train/stage2_caption.py", preset)
    assert (tmp_path / "run" / "checkpoints" / "step_4" / "engine").is_dir()
    assert difference(weights(tmp_path / "run"), weights(plain)) < 1e-5


@pytest.mark.slow
def test_a_qformer_that_reads_text_on_one_rank_alone_under_zero3(
    world: World, tmp_path: Path
) -> None:
    """A rank without a clip runs the same modules, there and back: collectives would wait."""
    manifest = str(pinned(world, tmp_path / "mixed.jsonl", batch_size=1, steps=2, media="video"))
    model = world.model | {"connector": connector(world)}
    changes = {
        "data__train": manifest,
        "train__batch_size": 1,
        "train__max_steps": 2,
        "train__warmup": 0,
    }
    asked = settings(world, tmp_path / "plain", "align", model=model, **changes)
    asked["objectives"] += [{"type": name} for name in TERMS]
    plain = run(asked, ranks=2)
    found = run_deepspeed({**asked, "output": str(tmp_path / "zero")}, "zero3.yaml")
    assert losses(found) == pytest.approx(losses(plain), abs=1e-5)
    assert [r["grad_norm"] for r in rows(found)] == pytest.approx(
        [r["grad_norm"] for r in rows(plain)], rel=1e-3
    )


def train_sharded(asked: dict[str, Any]) -> None:
    """Train a stage under FSDP on a CPU, which accelerate would turn into data parallelism."""
    config = RunConfig.model_validate(asked)
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = make_accelerator(config, folder)
    accelerator.state.fsdp_plugin = (
        FullyShardedDataParallelPlugin()
    )  # reads the launcher's variables
    accelerator.state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    set_seed(config.seed)
    start = begin(config, folder, precision_of(accelerator))
    trainer = Trainer(build_parts(start.config), accelerator, start)
    assert sum(isinstance(m, FSDPModule) for m in trainer.task.modules()) == 3, (
        "the LLM's two blocks and the rest"
    )
    trainer.train(StopRequest())


def test_a_budget_of_tokens_under_fsdp_is_one_process_without(
    world: World, unlimited: Path, tmp_path: Path
) -> None:
    changes = {"data__validation": str(world.captions), "train__validate_every": 2}
    asked = under_a_budget(world, tmp_path / "cut", **changes)
    together(
        train_sharded,
        asked,
        launcher=launcher_variables(HOUSE / "train" / "launch" / "fsdp.yaml", processes=2),
    )
    assert losses(tmp_path / "cut") == pytest.approx(losses(unlimited), abs=1e-5)
    assert difference(weights(tmp_path / "cut"), weights(unlimited)) < 1e-5


@pytest.mark.parametrize("stage", ["align", "caption"])
def test_fsdp_trains_saves_resumes_and_exports_the_same_weights(
    world: World, tmp_path: Path, stage: str
) -> None:
    asked = settings(
        world, tmp_path / "plain", stage, train__warmup=0, train__accumulate=2, train__save_every=2
    )
    if stage == "caption":
        asked |= {
            "lora": {"r": 2, "alpha": 4},
            "trainable": [["^connector", 1e-3], ["lora_", 1e-3], [".*", None]],
        }
    plain, found = run(asked, ranks=2), tmp_path / "sharded"
    asked["output"] = str(found)
    launcher = launcher_variables(HOUSE / "train" / "launch" / "fsdp.yaml", processes=2)
    together(train_sharded, asked, launcher=launcher)
    assert losses(found) == pytest.approx(losses(plain), abs=1e-5)
    assert difference(weights(found), weights(plain)) < 1e-5
    before = weights(found)
    for name in ("finished.json", "trained.safetensors"):
        (found / name).unlink()
    (found / "checkpoints" / "step_4").rename(tmp_path / "away")
    together(train_sharded, asked, launcher=launcher)
    assert difference(weights(found), before) == 0.0


def test_rates_with_weights_of_their_own_keep_no_process_waiting(
    world: World, tmp_path: Path
) -> None:
    """A micro batch has one rate, and so uses the weights of one."""
    pool = {"type": "pool_mlp", "stream": "video", "rates": [1, 2], "mode": "stack"}
    changes = {
        "model__connector": [pool, {"type": "linear", "stream": "audio"}],
        "data__rows": {"type": "matryoshka", "rates": {"video": [1, 2]}},
        "train__batch_size": 1,
        "train__max_steps": 3,
    }
    two = run(settings(world, tmp_path / "two", **changes), ranks=2)
    one = run(settings(world, tmp_path / "one", **changes, train__accumulate=2))
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    assert difference(weights(two), weights(one)) < 1e-5


def test_a_question_of_another_kind_on_each_process_under_fsdp(
    world: World, tmp_path: Path
) -> None:
    """Consistency runs the LLM once more for some kinds: all processes have to do so, or none."""
    changes = {"data__train": str(world.questions), "train__batch_size": 1, "train__max_steps": 4}
    asked = settings(world, tmp_path / "plain", **changes)
    asked["objectives"] += [{"type": "consistency", "irrelevant": {"heard": ["video"]}}]
    plain = run(asked, ranks=2)
    together(
        train_sharded,
        {**asked, "output": str(tmp_path / "sharded")},
        timeout=120.0,
        launcher=launcher_variables(HOUSE / "train" / "launch" / "fsdp.yaml", processes=2),
    )
    assert losses(tmp_path / "sharded") == pytest.approx(losses(plain), abs=1e-5)
