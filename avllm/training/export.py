"""Write a stage's whole checkpoint, also where processes hold pieces of its parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from avllm import distributed
from avllm.config import RunConfig
from avllm.data.manifest import digest
from avllm.models.building.adapter_config import set_of
from avllm.models.checkpoint import save_checkpoint
from avllm.models.loading.digests import ALL_FILES
from avllm.models.whole_folder import replacing
from avllm.training.points.position import RunPosition
from avllm.training.start import Parts
from avllm.training.task import Task, save_objectives

Sharding = Literal["whole", "fsdp", "zero3"]
"""Whole parameters on every process, or pieces spread over all processes."""


def stage_record(config: RunConfig, position: RunPosition, precision: str) -> dict[str, Any]:
    """Return the entry of a stage in its checkpoint's manifest: settings, data and outcome."""
    return {
        "stage": config.stage,
        "init": config.init,
        "steps": position.step,
        "processes": distributed.world_size(),
        "precision": precision,
        "settings": config.model_dump(mode="json"),
        "data": {source.manifest: digest(source.manifest) for source in config.data.train},
        "skipped": position.skipped,
    }


def export(
    folder: Path, parts: Parts, task: Task, record: dict[str, Any], sharding: Sharding
) -> None:
    """Write the checkpoint folder, all of it or nothing; every process has to call this.

    Args:
        folder: the folder to write.
        parts: model, processor and the stages before.
        task: the model with its objectives, not wrapped.
        record: the manifest's entry of this stage, see :func:`stage_record`.
        sharding: how the parameters lie; pieces are gathered first.
    """
    with whole_parameters(parts.model, task, sharding):
        if distributed.is_main():
            with replacing(folder, ALL_FILES) as partial:
                save_objectives(task, partial)
                save_checkpoint(parts.model, parts.processor, partial, [*parts.chain, record])
    distributed.barrier()


def whole_parameters(model: Any, task: Task, sharding: Sharding) -> AbstractContextManager[Any]:
    """Return a context in which every parameter that a checkpoint holds is whole."""
    if sharding == "whole":
        return nullcontext()
    if sharding == "fsdp":
        _reshard(task)
    trained = tuple(model.config.trained)
    parameters: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if name.startswith(trained) or set_of(name) is not None:
            parameters.append(parameter)
    parameters += task.objectives.parameters()
    if sharding == "fsdp":
        return _gathered_fsdp(task, parameters)
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(parameters)


def _reshard(task: torch.nn.Module) -> None:
    """Put FSDP's shards back in place.

    Validation has no backward pass, so it leaves the outermost parameters whole.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in task.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@dataclass(frozen=True)
class _Slot:
    """A name in a module under which an FSDP shard is registered."""

    module: torch.nn.Module
    name: str
    shard: torch.nn.Parameter

    def put(self, parameter: torch.nn.Parameter) -> None:
        self.module._parameters[self.name] = parameter

    def gathered(self) -> torch.nn.Parameter:
        """Return the whole parameter; every process has to call this."""
        tensor = self.shard.full_tensor().detach()  # type: ignore[attr-defined]
        return torch.nn.Parameter(tensor, requires_grad=self.shard.requires_grad)


@contextmanager
def _gathered_fsdp(task: torch.nn.Module, parameters: list[torch.nn.Parameter]) -> Iterator[None]:
    """Replace FSDP's shards by whole tensors.

    ``unshard`` is not enough: ``state_dict`` would shard the parameters again.
    """
    from torch.distributed.tensor import DTensor

    chosen = {id(parameter) for parameter in parameters}
    slots: list[_Slot] = []
    for module in task.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, DTensor) and id(parameter) in chosen:
                slots.append(_Slot(module, name, parameter))
    for slot in slots:
        slot.put(slot.gathered())
    try:
        yield
    finally:
        for slot in slots:
            slot.put(slot.shard)
