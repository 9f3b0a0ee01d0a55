"""Runs of the tiny world in killable child processes, on one or several ranks."""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401 (imported once here, not in every child)
import torch
from accelerate.state import PartialState
from safetensors.torch import load_file
from torch import Tensor

from avllm.config import RunConfig
from avllm.training.trainer import run_stage

torch.set_num_threads(1)
TIMEOUT = 600.0
"""Seconds; far above what a run takes, for machines that do much else."""
FORK = multiprocessing.get_context("fork")  # the children need not import torch again


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(
    function: Callable[..., Any],
    *args: Any,
    rank: int = 0,
    ranks: int = 1,
    port: int = 0,
    timeout: float = TIMEOUT,
    launcher: dict[str, str] | None = None,
) -> BaseProcess:
    """Call a function in a child process, as one of ``ranks`` processes of a launcher.

    The launcher is torchrun, or the one whose environment variables are given.
    """
    child = FORK.Process(
        target=_child, args=(function, args, rank, ranks, port, timeout, launcher or {})
    )
    child.start()
    return child


def _child(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    rank: int,
    ranks: int,
    port: int,
    timeout: float,
    launcher: dict[str, str],
) -> None:
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(timeout - 5, exit=True)  # a test that hangs says where
    os.environ.update(launcher)
    PartialState._reset_state()  # the parent's, where a test before has made an Accelerator
    if ranks > 1:
        names = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": ranks,
            "MASTER_PORT": port,
            "LOCAL_WORLD_SIZE": ranks,
        }
        os.environ.update({k: str(v) for k, v in names.items()} | {"MASTER_ADDR": "127.0.0.1"})
    function(*args)


def together(
    function: Callable[..., Any],
    *args: Any,
    ranks: int = 2,
    timeout: float = TIMEOUT,
    launcher: dict[str, str] | None = None,
) -> None:
    """Call a function on several ranks; fails when one fails or they do not end in time."""
    port = free_port()
    more = {"ranks": ranks, "port": port, "timeout": timeout, "launcher": launcher}
    children = [start(function, *args, rank=r, **more) for r in range(ranks)]
    until = time.monotonic() + timeout
    for child in children:
        child.join(max(0.1, until - time.monotonic()))
    codes = [child.exitcode for child in children]
    for child in children:
        if child.is_alive():
            child.kill()
    assert codes == [0] * ranks, f"exit codes {codes} (None: still running after {timeout} s)"


def launcher_variables(config_file: Path, processes: int) -> dict[str, str]:
    """The environment variables that `accelerate launch` with N processes sets in each."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    named = ["--config_file", str(config_file), "--num_processes", str(processes)]
    args, defaults, _ = _validate_launch_command(
        launch_command_parser().parse_args([*named, "script.py"])
    )
    args.main_process_port = free_port()
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        found = prepare_deepspeed_cmd_env(args)[1]
    else:
        found = prepare_multi_gpu_env(args)
    return {key: value for key, value in found.items() if os.environ.get(key) != value}


def train(settings: dict[str, Any]) -> None:
    """Train a stage in this process."""
    run_stage(RunConfig.model_validate(settings))


def run(settings: dict[str, Any], ranks: int = 1) -> Path:
    """Train a stage in child processes; returns the run's folder."""
    together(train, settings, ranks=ranks)
    return Path(settings["output"])


def kill_after(
    settings: dict[str, Any], step: int, ranks: int = 1, timeout: float = TIMEOUT
) -> None:
    """Train a stage in children and kill them with SIGKILL as soon as the metrics show the step."""
    port = free_port()
    children = [start(train, settings, rank=r, ranks=ranks, port=port) for r in range(ranks)]
    metrics = Path(settings["output"]) / "metrics.jsonl"
    until = time.monotonic() + timeout
    while time.monotonic() < until and children[0].is_alive():
        if metrics.is_file() and metrics.read_text().count("\n") >= step:
            break
        time.sleep(0.002)
    assert children[0].is_alive(), "the run ended before it could be killed"
    for child in children:
        os.kill(child.pid or 0, signal.SIGKILL)
    for child in children:
        child.join()
        assert child.exitcode == -signal.SIGKILL


def rows(run: Path) -> list[dict[str, float]]:
    """The training rows of a run's metrics, without what a clock measured."""
    clock = {"tokens_per_s", "data_wait", "seconds"}
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in clock} for row in found if "loss" in row]


def losses(run: Path) -> list[float]:
    """The training losses of a run."""
    return [row["loss"] for row in rows(run)]


def weights(run: Path) -> dict[str, Tensor]:
    """The trained weights of a run's checkpoint."""
    found = load_file(run / "trained.safetensors")
    for path in sorted(run.glob("lora/*/adapter_model.safetensors")):
        found |= {f"{path.parent.name}: {name}": tensor for name, tensor in load_file(path).items()}
    return found


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference between two sets of weights with the same names."""
    assert a.keys() == b.keys()
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)
