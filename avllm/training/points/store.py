"""Write and read resume points: everything that decides the rest of a run, whole or not at all.

A point is small: the trainable tensors, changing buffers, the optimizer and the position. The order
of the data and every random number are functions of (seed, step, micro-step, rank), so there is no
generator state to keep; the learning rate is a function of the step. A frozen LLM is never written.
"""

from __future__ import annotations

import datetime
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
    """The run folder holds other settings, or a resume point does not fit the model."""


@dataclass
class RunPosition:
    """Record how far a run has come.

    Attributes:
        step: optimizer steps done.
        seen: manifest rows looked at.
        skipped: rows left out, by ``source/reason``.
        best: best figure of validation (``train.best_by``), None before the first.
        trained: steps that had a target.
    """

    step: int = 0
    seen: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    best: float | None = None
    trained: int = 0


def write_atomic(path: Path, text: str) -> None:
    """Write a text file so that a reader, also after a crash, sees the old or the new text."""
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
    """Return the newest whole resume point of a run folder, None without one."""
    folders = (run / "checkpoints").glob("step_*")
    points = [folder for folder in folders if (folder / "position.json").is_file()]
    return max(points, key=_step_of, default=None)


def _step_of(point: Path) -> int:
    return int(point.name.removeprefix("step_"))


def check_same_run(run: Path, settings: dict[str, Any]) -> None:
    """Compare the settings of a run folder with those it is to go on with, or record them.

    A folder without a resume point holds nothing to go on with: after a start that failed, the
    settings may be others.

    Args:
        run: the run's folder.
        settings: the run's settings, with the digests of its inputs as ``inputs`` (see
            :func:`inputs`) and the precision that is computed in as ``computed_in``.

    Raises:
        ResumeError: a setting that decides numbers, or a file that is read, has changed.
    """
    path = run / "run.json"
    if not path.is_file() or not (latest(run) or (run / FINISHED).is_file()):
        if distributed.is_main():
            run.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps(settings, indent=1))
        return
    before = with_defaults(json.loads(path.read_text(encoding="utf-8")))
    comparable = dict(settings)
    for key in ("inputs", "computed_in"):
        if key not in before:  # an older run did not record it
            comparable.pop(key, None)
    changes = differences(before, json.loads(json.dumps(comparable)))
    if changes:
        lines = "; ".join(f"{c.key}: {c.old!r} then, {c.new!r} now" for c in changes)
        raise ResumeError(
            f"{run} holds a run with other settings or data ({lines}). Give another `output`, or "
            f"delete the folder to start from the beginning; only {', '.join(sorted(FREE_KEYS))} "
            "may change on the way"
        )


def with_date(config: RunConfig, run: Path) -> RunConfig:
    """Return settings with the day on which the run began, which chat templates may write.

    A run that goes on tomorrow writes the prompts of today.
    """
    if config.model is None or config.model.llm.date is not None:
        return config
    recorded: dict[str, Any] = {}
    if (run / "run.json").is_file():
        recorded = json.loads((run / "run.json").read_text(encoding="utf-8"))
    llm = (recorded.get("model") or {}).get("llm") or {}
    dated = config.model_copy(deep=True)
    assert dated.model is not None
    dated.model.llm.date = llm.get("date") or datetime.date.today().isoformat()
    return dated


def with_defaults(recorded: dict[str, Any]) -> dict[str, Any]:
    """Return recorded settings, completed with the defaults of settings that are newer."""
    own = {key: value for key, value in recorded.items() if key in RunConfig.model_fields}
    try:
        return recorded | RunConfig.model_validate(own).model_dump(mode="json")
    except ValidationError:  # settings of an older version: the comparison names what differs
        return recorded


def inputs(config: RunConfig) -> dict[str, Any]:
    """Return digests of manifests, quarantine files and the checkpoint that a stage starts from.

    A file that is missing has None.
    """
    paths: dict[str, Path] = {}
    for source in [*config.data.train, *config.data.validation]:
        paths[source.manifest] = local_copy(source.manifest)
    for name in config.data.quarantine:
        paths[name] = Path(name)
    digests: dict[str, Any] = {}
    for name, path in paths.items():
        digests[name] = digest(path) if path.is_file() else None
    if config.init is not None:
        sets = sorted((Path(config.init) / LORA).glob("*"))
        of_sets = [fingerprint(str(folder)) for folder in sets]
        digests[config.init] = [fingerprint(config.init), *of_sets]
    return digests


@dataclass(frozen=True)
class Change:
    """A setting whose value differs: its dotted key, the value before and the value now."""

    key: str
    old: Any
    new: Any


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[Change]:
    """Return the settings that differ and are not free, in the order of their keys."""
    changes: list[Change] = []
    for key in sorted(before.keys() | now.keys()):
        name = f"{prefix}{key}"
        old = before.get(key)
        new = now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changes += differences(old, new, name + ".")
        elif old != new and name not in FREE_KEYS:
            changes.append(Change(name, old, new))
    return changes


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


class ResumePoints:
    """Write and read a run's resume points: under DeepSpeed, FSDP, and with whole parameters.

    Args:
        run: the run's folder.
        accelerator: accelerate's Accelerator.
        task: the prepared (wrapped) task.
        bare: the task within it.
        optimizer: the prepared optimizer.
        keep: the number of points that stay.
    """

    def __init__(
        self,
        run: Path,
        accelerator: Any,
        task: nn.Module,
        bare: nn.Module,
        optimizer: Any,
        keep: int,
    ) -> None:
        self.folder = run / "checkpoints"
        self.keep = keep
        self.task = task
        self.bare = bare
        self.optimizer = optimizer
        self.kind = str(accelerator.distributed_type).rsplit(".", 1)[-1]

    def save(self, position: RunPosition) -> None:
        """Write this step's point into a hidden folder; rename it when every byte is on disk."""
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

    def load(self, point: Path) -> RunPosition:
        """Load tensors and optimizer, and return the position of the run."""
        if self.kind == "DEEPSPEED":
            engine: Any = self.task
            engine.load_checkpoint(str(point), tag="engine", load_module_strict=False)
        else:
            saved = torch.load(point / "trainable.pt", map_location="cpu", weights_only=True)
            self._load_plain(saved)
        return RunPosition(**json.loads((point / "position.json").read_text(encoding="utf-8")))

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

    def _drop_old(self) -> None:
        points = sorted(self.folder.glob("step_*"), key=_step_of)
        for point in points[: -self.keep]:
            shutil.rmtree(point.rename(point.with_name(f".{point.name}.old")))
        for leftover in self.folder.glob(".step_*"):
            shutil.rmtree(leftover)


def _full() -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(
        full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False
    )
