"""Make the Accelerator that fits a stage's settings and the launcher that started it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, KwargsHandler, ProjectConfiguration

from avllm import distributed
from avllm.config import RunConfig
from avllm.config_errors import ConfigError
from avllm.errors import UserError
from avllm.precision import Precision, choose_precision


def precision_of(accelerator: Accelerator) -> Precision:
    """Return the precision that an accelerator's autocast computes in."""
    return "bf16" if accelerator.mixed_precision == "bf16" else "fp32"


def make_accelerator(config: RunConfig, run: Path) -> Accelerator:
    """Make an Accelerator for the launcher of this process, with DeepSpeed's settings filled in.

    Raises:
        ConfigError: a tracker of ``train.trackers`` cannot be imported.
        UserError: processes that the launcher started did not form one group.
    """
    train = config.train
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
        log_with=train.trackers or None,
        project_config=ProjectConfiguration(project_dir=str(run), logging_dir=str(run / "logs")),
    )
    check_processes(accelerator)
    configure_deepspeed(accelerator, config)
    return accelerator


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are not installed, which accelerate leaves out in silence.

    Raises:
        ConfigError: a tracker cannot be imported.
    """
    installed = {str(tracker) for tracker in get_available_trackers()}
    absent = ", ".join(sorted(set(names) - installed - {"all"}))
    if absent:
        present = ", ".join(sorted(installed))
        raise ConfigError(
            f"train.trackers: {absent} cannot be imported; there is "
            f"{present}. Install it, or leave it out"
        )


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
