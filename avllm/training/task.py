"""The model and its objectives as the one module that is wrapped, trained and resumed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from avllm.registry import build

if TYPE_CHECKING:
    from avllm.data.collate import Batch


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

    def weights(self, batch: Batch) -> list[float]:
        """Each objective's number of targets in the batch."""
        return [objective.weight(batch) for objective in self.objectives.values()]  # type: ignore[operator]

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Loss sums by objective, and further sums named ``objective/figure``."""
        losses, figures = {}, {}
        for key, objective in self.objectives.items():
            losses[key], found = objective(self.model, batch)
            figures.update({f"{key}/{name}": value for name, value in found.items()})
        return losses, figures


def _free_name(name: str, taken: dict[str, float]) -> str:
    number = 2
    candidate = name
    while candidate in taken:
        candidate, number = f"{name}_{number}", number + 1
    return candidate
