"""Join the model and its objectives into the module that is wrapped, trained and resumed."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from avllm.errors import about_setting
from avllm.models.checkpoint_format import (
    MANIFEST,
    CheckpointError,
    read_manifest_of,
    write_tensors,
)
from avllm.models.loading.digests import check_files
from avllm.models.loading.files import reading
from avllm.models.loading.foreign_parts import refuse_foreign
from avllm.objectives.base import Objective
from avllm.registry import build
from avllm.weights import check_finite

if TYPE_CHECKING:
    from avllm.data.collate import Batch

OBJECTIVES = "objectives.safetensors"


class Task(nn.Module):
    """Hold a model and its objectives for DDP, FSDP or DeepSpeed; ``forward`` is one micro-step.

    Args:
        model: an AVLLM.
        specs: ``[{"type", "weight": 1.0, **options}]``.
    """

    def __init__(self, model: nn.Module, specs: Sequence[dict[str, Any]]) -> None:
        super().__init__()
        self.model = model
        self.objectives = nn.ModuleDict()
        self.shares: dict[str, float] = {}
        for spec in specs:
            options = dict(spec)
            share = float(options.pop("weight", 1.0))
            key = _free_name(str(spec.get("type", "")).rpartition(":")[2], self.shares)
            self.shares[key] = share
            with about_setting(f"objectives.{len(self.objectives)}"):
                self.objectives[key] = build("objectives", options, model)

    @property
    def config(self) -> Any:
        """Return the LLM's config: DeepSpeed reads the hidden size from it."""
        return self.model.llm.config  # type: ignore[union-attr]

    @property
    def _no_split_modules(self) -> list[str]:
        """Return the class names of the LLM's blocks: accelerate makes each a unit of FSDP."""
        llm: Any = self.model.llm
        return list(llm._no_split_modules or [])

    def weights(self, batch: Batch) -> list[float]:
        """Return each objective's number of targets in the batch."""
        objectives: Any = self.objectives.values()
        return [objective.weight(batch) for objective in objectives]

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Return buffers that DDP need not send in each forward pass: objectives sync them."""
        return [f"objectives.{name}" for name, _ in self.objectives.named_buffers()]

    def train(self, mode: bool = True) -> Task:
        """Set the mode; parts of objectives in which nothing trains stay in eval mode."""
        super().train(mode)
        for objective in self.objectives.values():
            for part in objective.children():
                if not any(p.requires_grad for p in part.parameters()):
                    part.eval()
        return self

    def has_hook(self, name: str) -> bool:
        """Return whether any objective overrides ``before_step`` or ``after_step``."""
        default = getattr(Objective, name)
        return any(getattr(type(o), name) is not default for o in self.objectives.values())

    def after_step(self) -> None:
        """Run the objectives' ``after_step``."""
        for objective in self.objectives.values():
            objective.after_step(self.model)  # type: ignore[operator]

    def forward(self, batch: Batch | list[Batch]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the loss sums by objective, and further sums named ``objective/figure``.

        A list is a whole step before its first backward pass: the objectives' ``before_step`` run
        and the sums are empty. They run in ``forward`` because the module that wraps the task
        gathers sharded weights and sets autocast there.
        """
        if isinstance(batch, list):
            for objective in self.objectives.values():
                objective.before_step(self.model, batch)  # type: ignore[operator]
            return {}, {}
        losses: dict[str, Tensor] = {}
        figures: dict[str, Tensor] = {}
        with self.model.shared_media():  # type: ignore[operator]
            for key, objective in self.objectives.items():
                losses[key], further = objective(self.model, batch)
                for name, value in further.items():
                    figures[f"{key}/{name}"] = value
            self._keep_on_graph(losses, batch)
        return losses, figures

    def _keep_on_graph(self, losses: dict[str, Tensor], batch: Batch) -> None:
        """Add zero times the media tokens to the last objective's loss.

        Media that no objective reads would otherwise leave parameters without a gradient, and
        processes wait for a gradient of every parameter that trains.
        """
        media = self.model.media_tokens(batch)  # type: ignore[operator]
        rest = [tokens.x.sum() for tokens in media.values()]
        last = list(self.objectives)[-1]
        losses[last] = losses[last] + 0.0 * sum(rest)


def persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers that change and are saved: running means, averages, queues."""
    for prefix, part in module.named_modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and name not in part._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer


def save_objectives(task: Task, folder: str | Path) -> None:
    """Write the objectives' parameters (projections, ...) and persistent buffers (queues, ...)."""
    state: dict[str, Tensor] = {}
    for name, tensor in own_state(task.objectives).items():
        state[name] = tensor.detach().cpu().clone()
    if state:
        write_tensors(state, Path(folder) / OBJECTIVES)


def own_state(objectives: nn.Module) -> dict[str, Tensor]:
    """Return the parameters, frozen ones too, and the persistent buffers."""
    return dict(objectives.named_parameters()) | dict(persistent_buffers(objectives))


def load_objectives(
    model: nn.Module, folder: str | Path, allow_parts: Collection[str] = ()
) -> nn.ModuleDict:
    """Load the objectives of a checkpoint's last stage, for retrieval and the like.

    Raises:
        CheckpointError: the last stage's objectives saved nothing, or their tensors do not fit.
        ForeignPartError: an objective is from outside of the package and not in ``allow_parts``.
    """
    path = Path(folder) / OBJECTIVES
    check_files(Path(folder), (OBJECTIVES,))
    stages = read_manifest_of(folder)["stages"]
    if not path.is_file() or not stages:
        raise CheckpointError(
            f"{folder} has no {OBJECTIVES}; expected the run of a stage whose objectives learn "
            "(stage 1)"
        )
    with reading(folder, f"the objectives in {MANIFEST}"):
        specs = stages[-1]["settings"]["objectives"]
        types = [str(spec["type"]) for spec in specs]
        refuse_foreign([name for name in types if ":" in name], folder, allow_parts)
        objectives = Task(model, specs).objectives
        saved = load_file(path)
        check_finite(saved.items(), path)
    own = own_state(objectives)
    fitting = {name for name in own.keys() & saved.keys() if own[name].shape == saved[name].shape}
    unfit = sorted(saved.keys() - fitting)
    missing = sorted(own.keys() - saved.keys())
    if unfit or missing:
        raise CheckpointError(
            f"{path} does not fit the objectives in {folder}'s manifest: missing {missing[:3]}, "
            f"unexpected or of another shape {unfit[:3]}"
        )
    with torch.no_grad():
        for name, tensor in saved.items():
            own[name].copy_(tensor)
    return objectives.eval()


def _free_name(name: str, taken: dict[str, float]) -> str:
    candidate = name
    number = 2
    while candidate in taken:
        candidate = f"{name}_{number}"
        number += 1
    return candidate
