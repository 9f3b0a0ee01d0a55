"""Resume points: everything that decides the rest of a run, written whole or not at all.

What is kept is small: the trainable tensors, changing buffers, the optimizer and the position. The order of the data
and every random number are functions of (seed, step, micro-step, rank), so there is no generator state to keep; the
learning rate is a function of the step. A frozen LLM is never written here.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from avllm import distributed
from avllm.config import RunConfig
from avllm.data.manifest import digest
from avllm.data.store.storage import local_copy
from avllm.errors import UserError
from avllm.models.checkpoint_format import LORA, fingerprint
from avllm.training.task import persistent_buffers

FINISHED = "finished.json"
FREE_KEYS = {
    "train.log_every",
    "train.trackers",
    "train.keep",
    "train.save_every",
    "data.num_workers",
    "data.keep_decoded",
    "data.cache_max_gb",
    "data.timeout",
    "data.max_skip_rate",
}
"""Settings that may differ when a run goes on: none of them changes a number of it."""


class ResumeError(UserError):
    """The run folder belongs to a run with other settings, or a resume point does not fit the model."""


@dataclass
class Position:
    """Where a run stands.

    Attributes:
        step: optimizer steps done; trained: those of them that had a target.
        seen: manifest rows looked at; skipped: rows left out, by ``source/reason``.
        best: lowest validation loss, None before the first.
    """

    step: int = 0
    seen: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    best: float | None = None
    trained: int = 0


def write_atomic(path: Path, text: str) -> None:
    """Write a text file so that a reader, or a crash, sees the old one or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def latest(run: Path) -> Path | None:
    """The newest whole resume point of a run folder."""
    points = [p for p in (run / "checkpoints").glob("step_*") if (p / "position.json").is_file()]
    return max(points, key=lambda p: int(p.name.removeprefix("step_")), default=None)


def check_same_run(run: Path, settings: dict[str, Any]) -> None:
    """Compare the settings of a run folder with those it is asked to go on with, or record them.

    A folder without a resume point holds nothing to go on with: a start that failed may be repeated otherwise.

    Args:
        run: the run's folder.
        settings: the run's, under ``inputs`` the digests of what it reads, see :func:`inputs`, and under
            ``computed_in`` what ``precision`` means here.

    Raises:
        ResumeError: a setting that decides numbers, or a file that is read, is another one.
    """
    path = run / "run.json"
    if not path.is_file() or not (latest(run) or (run / FINISHED).is_file()):
        if distributed.is_main():
            run.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps(settings, indent=1))
        return
    before = with_defaults(json.loads(path.read_text(encoding="utf-8")))
    settings = {k: v for k, v in settings.items() if k in before or k not in ("inputs", "computed_in")}
    differing = differences(before, json.loads(json.dumps(settings)))
    if differing:
        lines = "; ".join(f"{key}: {old!r} then, {new!r} now" for key, old, new in differing)
        raise ResumeError(
            f"{run} holds a run with other settings or data ({lines}). Give another `output`, or delete the folder to "
            f"start anew; only {', '.join(sorted(FREE_KEYS))} may change on the way"
        )


def with_defaults(recorded: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run folder, with those that did not exist when it was begun at their defaults."""
    own = {key: value for key, value in recorded.items() if key in RunConfig.model_fields}
    try:
        return recorded | RunConfig.model_validate(own).model_dump(mode="json")
    except ValidationError:  # settings of another time: the comparison will name what differs
        return recorded


def inputs(config: RunConfig) -> dict[str, Any]:
    """Digests of manifests, quarantine files and the checkpoint to start from; None where a file is missing."""
    files = {s.manifest: local_copy(s.manifest) for s in [*config.data.train, *config.data.validation]}
    files |= {name: Path(name) for name in config.data.quarantine}
    found: dict[str, Any] = {name: digest(path) if path.is_file() else None for name, path in files.items()}
    if config.init is not None:
        sets = sorted((Path(config.init) / LORA).glob("*"))
        found[config.init] = [fingerprint(config.init), *(fingerprint(str(folder)) for folder in sets)]
    return found


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, old, new) of settings that differ and are not free."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        name, old, new = f"{prefix}{key}", before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, name + ".")
        elif old != new and name not in FREE_KEYS:
            found.append((name, old, new))
    return found


def trainable_state(task: nn.Module) -> dict[str, Tensor]:
    """What training changes: parameters with gradients, and the persistent buffers (running means, queues)."""
    state = {name: p.detach() for name, p in task.named_parameters() if p.requires_grad}
    return state | {name: buffer.detach() for name, buffer in persistent_buffers(task)}


def load_trainable(task: nn.Module, state: dict[str, Tensor]) -> None:
    """Put saved tensors back.

    Raises:
        ResumeError: the names or shapes are not those that train now.
    """
    here = trainable_state(task)
    missing, unknown = sorted(here.keys() - state.keys()), sorted(state.keys() - here.keys())
    if missing or unknown:
        raise ResumeError(f"the resume point lacks {missing[:3]}, has {unknown[:3]} too many; was the model changed?")
    with torch.no_grad():
        for name, tensor in here.items():
            if tensor.shape != state[name].shape:
                raise ResumeError(f"{name}: {tuple(state[name].shape)} in the resume point, {tuple(tensor.shape)} here")
            tensor.copy_(state[name])


class ResumePoints:
    """Writes and reads a run's resume points; knows the three ways in which parameters can lie over processes.

    Args:
        run: the run's folder.
        accelerator: accelerate's Accelerator.
        task: the prepared (wrapped) task; bare: the task within it; optimizer: the prepared optimizer.
        keep: how many points stay.
    """

    def __init__(
        self, run: Path, accelerator: Any, task: nn.Module, bare: nn.Module, optimizer: Any, keep: int
    ) -> None:
        self.folder, self.keep = run / "checkpoints", keep
        self.task, self.bare, self.optimizer = task, bare, optimizer
        self.kind = str(accelerator.distributed_type).rsplit(".", 1)[-1]

    def save(self, position: Position) -> None:
        """Write the point of this step: into a hidden folder first, renamed when every byte is on the disk."""
        final = self.folder / f"step_{position.step}"
        partial = self.folder / f".step_{position.step}.partial"
        if distributed.is_main():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        distributed.barrier()
        self._save_tensors(partial)
        distributed.barrier()
        if distributed.is_main():
            write_atomic(partial / "position.json", json.dumps(asdict(position)))
            if final.exists():
                shutil.rmtree(final)
            partial.rename(final)
            _sync_folder(self.folder)
            self._drop_old()
        distributed.barrier()

    def load(self, point: Path) -> Position:
        """Put tensors and optimizer back and say where the run stood."""
        if self.kind == "DEEPSPEED":
            self.task.load_checkpoint(str(point), tag="engine", load_module_strict=False)  # type: ignore[operator]
        else:
            saved = torch.load(point / "trainable.pt", map_location="cpu", weights_only=True)
            self._load_plain(saved)
        return Position(**json.loads((point / "position.json").read_text(encoding="utf-8")))

    def _save_tensors(self, folder: Path) -> None:
        if self.kind == "DEEPSPEED":
            self.task.save_checkpoint(str(folder), tag="engine", exclude_frozen_parameters=True)  # type: ignore[operator]
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
        return {"model": trainable_state(self.bare), "optimizer": self.optimizer.optimizer.state_dict()}

    def _load_plain(self, saved: dict[str, Any]) -> None:
        if self.kind == "FSDP":
            from torch.distributed.checkpoint.state_dict import set_state_dict

            parts = {"model_state_dict": saved["model"], "optim_state_dict": saved["optimizer"]}
            set_state_dict(self.task, self.optimizer.optimizer, **parts, options=_full())
            return
        load_trainable(self.bare, saved["model"])
        self.optimizer.optimizer.load_state_dict(saved["optimizer"])

    def _drop_old(self) -> None:
        points = sorted(self.folder.glob("step_*"), key=lambda p: int(p.name.removeprefix("step_")))
        for point in points[: -self.keep]:
            shutil.rmtree(point.rename(point.with_name(f".{point.name}.old")))
        for leftover in self.folder.glob(".step_*"):
            shutil.rmtree(leftover)


def _full() -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)
