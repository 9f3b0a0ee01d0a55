"""The Accelerator that fits a stage's settings and the launcher that started it."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration

from avllm import distributed
from avllm.config import ConfigError, RunConfig
from avllm.errors import UserError
from avllm.precision import Precision, choose_precision


def precision_of(accelerator: Accelerator) -> Precision:
    """What an accelerator's autocast computes in."""
    return "bf16" if accelerator.mixed_precision == "bf16" else "fp32"


def make_accelerator(config: RunConfig, run: Path) -> Accelerator:
    """An Accelerator for the launcher that this process runs under, with DeepSpeed's settings filled in."""
    train = config.train
    here = {str(t) for t in get_available_trackers()}
    absent = ", ".join(sorted(set(train.trackers) - here - {"all"}))
    if absent:  # accelerate leaves them out in silence
        known = ", ".join(sorted(here))
        raise ConfigError(f"train.trackers: {absent} cannot be imported; there is {known}. Install it, or leave it out")
    AcceleratorState._reset_state()  # a stage before in this process may have had another precision
    on_cpu, by_deepspeed = not torch.accelerator.is_available(), os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    accelerator = Accelerator(
        # without cpu=True accelerate starts no process group under torchrun on CPUs; with it, it overlooks DeepSpeed
        cpu=on_cpu and not by_deepspeed,
        # and without a named backend it takes each DeepSpeed process on CPUs for the only one
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if on_cpu and by_deepspeed else None,
        mixed_precision={"fp32": "no", "bf16": "bf16"}[choose_precision(train.precision, device.type)],
        gradient_accumulation_steps=train.accumulate,
        log_with=train.trackers or None,
        project_config=ProjectConfiguration(project_dir=str(run), logging_dir=str(run / "logs")),
    )
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if not asked == distributed.world_size() == accelerator.num_processes:
        raise UserError(
            f"the launcher started {asked} processes, but {accelerator.num_processes} found each other; "
            "start CPU processes with torchrun (accelerate's --cpu starts one)"
        )
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = train.batch_size
        plugin.deepspeed_config["gradient_accumulation_steps"] = train.accumulate
        plugin.deepspeed_config["gradient_clipping"] = train.clip or 0.0
        from transformers.integrations import unset_hf_deepspeed_config

        # Backbones are loaded whole and split by DeepSpeed afterwards: transformers' way of splitting them while they
        # are loaded leaves empty shells that the initialisation of composed models and of Whisper cannot fill.
        unset_hf_deepspeed_config()
    return accelerator
