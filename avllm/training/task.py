"""The model and its objectives as the one module that is wrapped, trained and resumed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from avllm.models.checkpoint_format import CheckpointError, read_manifest_of, write_tensors
from avllm.registry import build

if TYPE_CHECKING:
    from avllm.data.collate import Batch

OBJECTIVES = "objectives.safetensors"


class Task(nn.Module):
    """Model + objectives. What DDP, FSDP or DeepSpeed wrap; its forward is one micro-step.

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
            self.objectives[key] = build("objectives", options, model)

    @property
    def config(self) -> Any:
        """The LLM's config: DeepSpeed reads the hidden size from it."""
        return self.model.llm.config  # type: ignore[union-attr]

    @property
    def _no_split_modules(self) -> list[str]:
        """The class names of the LLM's blocks: accelerate makes each a unit of FSDP's."""
        return list(self.model.llm._no_split_modules or [])  # type: ignore[union-attr,arg-type]

    def weights(self, batch: Batch) -> list[float]:
        """Each objective's number of targets in the batch."""
        return [objective.weight(batch) for objective in self.objectives.values()]  # type: ignore[operator]

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Loss sums by objective, and further sums named ``objective/figure``."""
        losses, figures = {}, {}
        with self.model.shared_media():  # type: ignore[operator]
            for key, objective in self.objectives.items():
                losses[key], found = objective(self.model, batch)
                figures.update({f"{key}/{name}": value for name, value in found.items()})
            # What no objective reads stays on the graph: processes wait for a gradient of every parameter that trains.
            rest = [tokens.x.sum() for tokens in self.model.media_tokens(batch).values()]  # type: ignore[operator]
            losses[key] = losses[key] + 0.0 * sum(rest)
        return losses, figures


def save_objectives(task: Task, folder: str | Path) -> None:
    """Write the objectives' own parameters (projections, temperature) beside the checkpoint, frozen ones too."""
    state = {n: p.detach().cpu().clone() for n, p in task.objectives.named_parameters()}
    if state:
        write_tensors(state, Path(folder) / OBJECTIVES)


def load_objectives(model: nn.Module, folder: str | Path) -> nn.ModuleDict:
    """The objectives of a checkpoint's last stage as they were at its end, for retrieval and the like.

    Raises:
        CheckpointError: the last stage's objectives kept nothing, or it does not fit.
    """
    path = Path(folder) / OBJECTIVES
    stages = read_manifest_of(folder)["stages"]
    if not path.is_file() or not stages:
        raise CheckpointError(
            f"{folder} has no {OBJECTIVES}; expected the run of a stage whose objectives learn (stage 1)"
        )
    objectives = Task(model, stages[-1]["settings"]["objectives"]).objectives
    saved = {name: torch.atleast_1d(tensor) for name, tensor in load_file(path).items()}
    own = dict(objectives.named_parameters())
    odd = sorted(n for n, tensor in saved.items() if n not in own or own[n].shape != tensor.shape)
    missing = sorted(own.keys() - saved.keys())
    if odd or missing:
        raise CheckpointError(
            f"{path} does not fit the objectives in {folder}'s manifest: missing {missing[:3]}, "
            f"unexpected or of another shape {odd[:3]}"
        )
    with torch.no_grad():
        for name, tensor in saved.items():
            own[name].copy_(tensor)
    return objectives.eval()


def _free_name(name: str, taken: dict[str, float]) -> str:
    number = 2
    candidate = name
    while candidate in taken:
        candidate, number = f"{name}_{number}", number + 1
    return candidate
