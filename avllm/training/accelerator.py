"""Make the Accelerator that fits a stage's settings and the launcher that started it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker, get_available_trackers
from accelerate.utils import (
    InitProcessGroupKwargs,
    KwargsHandler,
    LoggerType,
    ProjectConfiguration,
)

from avllm import distributed
from avllm.config import RunConfig
from avllm.config_errors import ConfigError
from avllm.errors import UserError, about_setting, one_line
from avllm.precision import Precision, choose_precision
from avllm.registry import load_class, make, suggest
from avllm.training.points.record import FREE_KEYS, LENGTHS
from avllm.yaml_files import nearest


def precision_of(accelerator: Accelerator) -> Precision:
    """Return the precision that an accelerator's autocast computes in."""
    return "bf16" if accelerator.mixed_precision == "bf16" else "fp32"


def make_accelerator(config: RunConfig, run: Path) -> Accelerator:
    """Make an Accelerator for the launcher of this process, with DeepSpeed's settings filled in.

    Raises:
        ConfigError: a tracker of ``train.trackers`` is unknown or not installed.
        UserError: processes that the launcher started did not form one group.
    """
    train = config.train
    with about_setting("train.trackers"):
        check_trackers(train.trackers)
    # A stage that ran before in this process may have had another precision.
    AcceleratorState._reset_state()
    on_cpu = not torch.accelerator.is_available()
    by_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    precision = choose_precision(train.precision, device.type)
    handlers: list[KwargsHandler] = []
    if on_cpu and by_deepspeed:
        # Without a named backend accelerate takes each DeepSpeed process on CPUs for the only one.
        handlers.append(InitProcessGroupKwargs(backend="gloo"))
    accelerator = Accelerator(
        # Without cpu=True accelerate starts no process group under torchrun on CPUs; with it,
        # accelerate overlooks DeepSpeed.
        cpu=on_cpu and not by_deepspeed,
        kwargs_handlers=handlers or None,
        mixed_precision={"fp32": "no", "bf16": "bf16"}[precision],
        gradient_accumulation_steps=train.accumulate,
        log_with=[name for name in train.trackers if ":" not in name] or None,
        project_config=ProjectConfiguration(project_dir=str(run), logging_dir=str(run / "logs")),
    )
    check_processes(accelerator)
    configure_deepspeed(accelerator, config)
    return accelerator


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are not installed, which accelerate leaves out in silence.

    Raises:
        ConfigError: ``unknown_tracker`` or ``not_installed``.
        UnknownPartError: ``pkg.module:Class`` names no tracker.
    """
    installed = [str(tracker) for tracker in get_available_trackers()]
    known = [str(kind) for kind in LoggerType]
    for name in names:
        if name in ("all", *installed):
            continue
        if ":" in name:
            load_class(name, GeneralTracker)
            continue
        if name not in known:
            raise ConfigError(
                f"there is no tracker {name!r}; {suggest(name, known)}, or pkg.module:Class",
                reason="unknown_tracker",
            )
        raise ConfigError(
            f"tracker {name} is not installed: pip install {name}; installed are "
            f"{', '.join(installed)}",
            reason="not_installed",
        )


@contextmanager
def tracked_run(accelerator: Accelerator, config: RunConfig) -> Iterator[None]:
    """Start the trackers, with the run's name and settings, and end them after the block.

    They start before a model is loaded: a program that needs a login says so at once. Only the main
    process has trackers.

    Raises:
        ConfigError: ``tracker``: one cannot start.
    """
    if distributed.is_main():
        try:
            _start_trackers(accelerator, config)
        except Exception as error:  # each program has its classes of errors
            refused = ConfigError(
                f"train.trackers {config.train.trackers}: one cannot start ({one_line(error)}). "
                "Log in or set its key, choose its offline mode (WANDB_MODE=offline, "
                "SWANLAB_MODE=local, ...), or leave it out: train.trackers=[]",
                reason="tracker",
            )
            refused.setting = "train.trackers"
            raise refused from error
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.trackers = []


def _start_trackers(accelerator: Accelerator, config: RunConfig) -> None:
    """Start accelerate's trackers by name, and classes of users, which get the run's folder."""
    classes = [load_class(name, GeneralTracker) for name in config.train.trackers if ":" in name]
    accelerator.log_with += [make(tracker, Path(config.output)) for tracker in classes]
    name = run_name(config)
    accelerator.init_trackers(
        "avllm",
        init_kwargs={
            "wandb": {"name": name},
            "trackio": {"name": name},
            "swanlab": {"experiment_name": name},
            "mlflow": {"run_name": name},
            "clearml": {"task_name": name},
            "aim": {"experiment": name},
            "dvclive": {"dir": str(Path(config.output) / "dvclive")},
        },
    )
    for tracker in accelerator.trackers:
        tracker.store_init_configuration(hyper_parameters(config, tracker.name))


def run_name(config: RunConfig) -> str:
    """Return the name of a run in trackers: the last two folders of its output."""
    return "-".join(Path(config.output).absolute().parts[-2:])


def hyper_parameters(config: RunConfig, tracker: str) -> dict[str, str | int | float | bool]:
    """Return the settings as trackers take them: dotted keys, texts and numbers.

    Settings that change no number are left out. MLflow refuses a parameter with another value than
    before, so it does not get those that may grow when a run goes on.
    """
    left_out = FREE_KEYS | set(LENGTHS if tracker == "mlflow" else ())
    values = dict(_flat(config.model_dump(mode="json"), ""))
    return {key: value for key, value in values.items() if not nearest(key, left_out)}


def _flat(value: Any, key: str) -> Iterator[tuple[str, str | int | float | bool]]:
    """Yield the leaves of nested settings by their dotted keys."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        items = list(enumerate(value))
    elif isinstance(value, str | int | float | bool):
        yield key, value
    else:
        yield key, json.dumps(value)
    for name, item in items:
        yield from _flat(item, f"{key}.{name}" if key else str(name))


def check_processes(accelerator: Accelerator) -> None:
    """Check that all processes of the launcher form one group.

    Raises:
        UserError: they do not: each would train alone and write the same files.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    grouped = accelerator.num_processes
    if not started == distributed.world_size() == grouped:
        raise UserError(
            f"the launcher started {started} processes, but {grouped} found each other; "
            "start CPU processes with torchrun (accelerate's --cpu starts one)"
        )


def configure_deepspeed(accelerator: Accelerator, config: RunConfig) -> None:
    """Fill the stage's settings into DeepSpeed's, if DeepSpeed runs."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None:
        return
    settings = plugin.deepspeed_config
    settings["train_micro_batch_size_per_gpu"] = config.train.batch_size
    settings["gradient_accumulation_steps"] = config.train.accumulate
    settings["gradient_clipping"] = config.train.clip or 0.0
    from transformers.integrations import unset_hf_deepspeed_config

    # Backbones are loaded whole and split by DeepSpeed afterwards. If transformers splits them
    # while they are loaded, empty shells are left, which the initialisation of composed models and
    # of Whisper cannot fill.
    unset_hf_deepspeed_config()
