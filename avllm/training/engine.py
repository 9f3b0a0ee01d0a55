"""Compute gradients and take optimizer steps, with DeepSpeed's engine or without it."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from avllm.training.export import Sharding


class Engine:
    """Run backward passes and optimizer steps of a prepared task.

    Args:
        accelerator: it has prepared the task and the optimizer.
        task: the prepared (wrapped) task.
        optimizer: the prepared optimizer.
        accumulate: micro-steps of an optimizer step, as DeepSpeed counts them.
        clip: the largest norm of the gradient; None = no limit.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        task: nn.Module,
        optimizer: Any,
        accumulate: int,
        clip: float | None,
    ) -> None:
        self.accelerator = accelerator
        self.task = task
        self.optimizer = optimizer
        self.accumulate = accumulate
        self.max_norm = clip or math.inf
        self.is_deepspeed = accelerator.state.deepspeed_plugin is not None

    def gradients_stay_here(self, last: bool) -> AbstractContextManager[Any]:
        """Return a context in which gradients are not exchanged, until the last micro-step."""
        if last or self.is_deepspeed:
            return nullcontext()
        return self.accelerator.no_sync(self.task)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Compute the gradients of a micro-step.

        DeepSpeed divides by its accumulation, and takes its optimizer step in the last one.
        """
        if self.is_deepspeed:
            wrapped = self.accelerator.deepspeed_engine_wrapped
            wrapped.backward(loss * self.accumulate, sync_gradients=last)
        elif loss.requires_grad:  # False for rows of text alone and a frozen LLM
            loss.backward()

    def clip_gradients(self) -> float:
        """Clip the gradients and return their norm before that; DeepSpeed has clipped already."""
        if self.is_deepspeed:
            engine = self.accelerator.deepspeed_engine_wrapped
            return float(engine.get_global_grad_norm() or 0.0)
        parameters = [p for p in self.task.parameters() if p.requires_grad]
        for p in parameters:
            # A stream that no row has gets zeros, as it would with several processes.
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        return float(self.accelerator.clip_grad_norm_(parameters, self.max_norm))

    def step(self) -> None:
        """Take the optimizer's step and drop the gradients; DeepSpeed has done both already."""
        if not self.is_deepspeed:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def sharding(self) -> Sharding:
        """Return how the parameters lie over the processes."""
        if self.accelerator.distributed_type == DistributedType.FSDP:
            return "fsdp"
        if self.is_deepspeed and self.task.zero_optimization_stage() == 3:  # type: ignore[operator]
            return "zero3"
        return "whole"
