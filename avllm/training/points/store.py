"""Write and read resume points: everything that decides the rest of a run, whole or not at all.

A point is small: the trainable tensors, changing buffers, the optimizer and the position. The order
of the data and every random number are functions of (seed, step, micro-step, rank), so there is no
generator state to keep; the learning rate is a function of the step. A frozen LLM is never written.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from avllm import distributed
from avllm.data.store.append_only import sync
from avllm.errors import writing
from avllm.training.points.position import RunPosition
from avllm.training.points.tensors import load_trainable, trainable_state
from avllm.training.points.whole import POINTS, ResumePoint, points_of, seal, step_of


class ResumePoints:
    """Write and read a run's resume points: under DeepSpeed, FSDP, and with whole parameters.

    Args:
        run: the run's folder.
        accelerator: accelerate's Accelerator.
        task: the prepared (wrapped) task.
        bare: the task within it.
        optimizer: the prepared optimizer.
        keep: the number of points that stay.
        record: of the run; each point holds it.
    """

    def __init__(
        self,
        run: Path,
        accelerator: Any,
        task: nn.Module,
        bare: nn.Module,
        optimizer: Any,
        keep: int,
        record: dict[str, Any],
    ) -> None:
        self.run = run
        self.folder = run / POINTS
        self.record = record
        self.keep = keep
        self.task = task
        self.bare = bare
        self.optimizer = optimizer
        self.kind = str(accelerator.distributed_type).rsplit(".", 1)[-1]

    def save(self, position: RunPosition) -> None:
        """Write this step's point into a hidden folder; rename it when every byte is on disk.

        Raises:
            WriteError: it cannot be written; the points before stay.
        """
        final = self.folder / f"step_{position.step}"
        partial = self.folder / f".step_{position.step}.partial"
        try:
            with writing(final):
                self._write(partial, position)
        except BaseException:
            if distributed.is_main():
                shutil.rmtree(partial, ignore_errors=True)
            raise
        if distributed.is_main():
            if final.exists():
                shutil.rmtree(final)
            partial.rename(final)
            sync(self.folder)
            self._drop_old(position.step)
        distributed.barrier()

    def _write(self, folder: Path, position: RunPosition) -> None:
        if distributed.is_main():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        distributed.barrier()
        self._save_tensors(folder)
        distributed.barrier()
        seal(folder, position, self.record)

    def load(self, point: ResumePoint) -> RunPosition:
        """Load tensors and optimizer, and return the position of the run."""
        if self.kind == "DEEPSPEED":
            engine: Any = self.task
            engine.load_checkpoint(str(point.folder), tag="engine", load_module_strict=False)
        else:
            path = point.folder / "trainable.pt"
            self._load_plain(torch.load(path, map_location="cpu", weights_only=True))
        return point.position

    def _save_tensors(self, folder: Path) -> None:
        if self.kind == "DEEPSPEED":
            engine: Any = self.task
            engine.save_checkpoint(str(folder), tag="engine", exclude_frozen_parameters=True)
            return
        state = self._plain_state()  # collective under FSDP
        if distributed.is_main():
            with (folder / "trainable.pt").open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())

    def _plain_state(self) -> dict[str, Any]:
        if self.kind == "FSDP":
            from torch.distributed.checkpoint.state_dict import get_state_dict

            model, optimizer = get_state_dict(self.task, self.optimizer.optimizer, options=_full())
            return {"model": model, "optimizer": optimizer}
        optimizer = self.optimizer.optimizer.state_dict()
        return {"model": trainable_state(self.bare), "optimizer": optimizer}

    def _load_plain(self, saved: dict[str, Any]) -> None:
        if self.kind == "FSDP":
            from torch.distributed.checkpoint.state_dict import set_state_dict

            parts = {"model_state_dict": saved["model"], "optim_state_dict": saved["optimizer"]}
            set_state_dict(self.task, self.optimizer.optimizer, **parts, options=_full())
            return
        load_trainable(self.bare, saved["model"])
        self.optimizer.optimizer.load_state_dict(saved["optimizer"])

    def _drop_old(self, step: int) -> None:
        """Delete the points that are too many, and those after this step: they are damaged.

        A run that goes on from a point has passed over all newer ones.
        """
        points = points_of(self.run)
        newer = [point for point in points if step_of(point) > step]
        older = [point for point in points if step_of(point) <= step]
        for point in newer + older[: -self.keep]:
            shutil.rmtree(point.rename(point.with_name(f".{point.name}.old")))
        for leftover in self.folder.glob(".step_*"):
            shutil.rmtree(leftover)


def _full() -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(
        full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False
    )
