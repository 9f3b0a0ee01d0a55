"""Write a stage's checkpoint, whole, however its parameters lie over the processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch

from avllm import distributed
from avllm.models.checkpoint import save_checkpoint
from avllm.training.start import Parts
from avllm.training.task import Task, save_objectives

Sharding = Literal["whole", "fsdp", "zero3"]
"""Where a parameter lies: on every process, or in pieces over all of them."""


def export(folder: Path, parts: Parts, task: Task, record: dict[str, Any], sharding: Sharding) -> None:
    """Write the checkpoint folder; every process has to call this.

    Args:
        folder: where to.
        parts: model, processor and the stages before.
        task: the model with its objectives, not wrapped.
        record: what the manifest says of this stage.
        sharding: how the parameters lie; pieces are brought together first.
    """
    with whole_parameters(parts.model, task, sharding):
        if distributed.is_main():
            save_checkpoint(parts.model, parts.processor, folder, [*parts.chain, record])
            save_objectives(task, folder)
    distributed.barrier()


def whole_parameters(model: Any, task: Task, sharding: Sharding) -> AbstractContextManager[Any]:
    """Bring together the parameters of everything that a checkpoint holds, for as long as the block lasts."""
    if sharding == "whole":
        return nullcontext()
    if sharding == "fsdp":
        _reshard(task)
    trained = tuple(model.config.trained)
    held = [p for n, p in model.named_parameters() if n.startswith(trained) or "lora_" in n]
    held += task.objectives.parameters()
    if sharding == "fsdp":
        return _whole(task, held)
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(held)


def _reshard(task: torch.nn.Module) -> None:
    """Put FSDP's shards back in place: validation, which has no backward pass, leaves the outermost ones whole."""
    from torch.distributed.fsdp import FSDPModule

    for module in task.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def _whole(task: torch.nn.Module, held: list[torch.nn.Parameter]) -> Iterator[None]:
    """Put whole tensors in the place of FSDP's shards (``unshard`` does not do: ``state_dict`` shards again)."""
    from torch.distributed.tensor import DTensor

    wanted = {id(p) for p in held}
    places: list[tuple[torch.nn.Module, str, torch.nn.Parameter]] = [
        (module, name, p)
        for module in task.modules()
        for name, p in module._parameters.items()
        if p is not None and isinstance(p, DTensor) and id(p) in wanted
    ]
    for module, name, p in places:
        module._parameters[name] = torch.nn.Parameter(p.full_tensor().detach(), requires_grad=p.requires_grad)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module, name, p in places:
            module._parameters[name] = p
