"""Take the tensors that training changes out of a task, and put them back."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from avllm.training.points.record import ResumeError
from avllm.training.task import persistent_buffers


def trainable_state(task: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that training changes: trainable parameters and persistent buffers."""
    state = {name: p.detach() for name, p in task.named_parameters() if p.requires_grad}
    for name, buffer in persistent_buffers(task):
        state[name] = buffer.detach()
    return state


def load_trainable(task: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy saved tensors into the parameters and buffers that training changes.

    Raises:
        ResumeError: the names or shapes are not those that train now.
    """
    own = trainable_state(task)
    missing = sorted(own.keys() - state.keys())
    unknown = sorted(state.keys() - own.keys())
    if missing or unknown:
        raise ResumeError(
            f"the resume point lacks {missing[:3]}, has {unknown[:3]} too many; expected the "
            "tensors that train now. Was the model changed? Give another `output`"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            saved = state[name]
            if tensor.shape != saved.shape:
                raise ResumeError(
                    f"{name}: {tuple(saved.shape)} in the resume point, {tuple(tensor.shape)} in "
                    "the model; was the model changed? Give another `output`"
                )
            tensor.copy_(saved)
