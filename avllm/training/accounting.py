"""Count targets, tokens and bad rows over all processes, sum up losses, compare figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from avllm import distributed
from avllm.data.items import Bad
from avllm.data.loader import Collate, MicroBatch
from avllm.errors import UserError
from avllm.training.task import Task


@dataclass(frozen=True)
class StepCounts:
    """Counts of one optimizer step, summed over its micro batches and over all processes.

    Attributes:
        targets: of each objective, in the order of the task's objectives.
        filled: places of the token sequences that hold a token and no padding.
        places: all places of the token sequences, padding included.
        seen: manifest rows looked at.
        tokens: tokens of the rows, media included, for the throughput.
        bad: rows that were left out.
    """

    targets: list[float]
    filled: float
    places: float
    seen: int
    tokens: float
    bad: list[Bad]

    @property
    def padding(self) -> float:
        """The share of places that hold padding."""
        return 1 - self.filled / self.places


def count_step(task: Task, micros: Sequence[MicroBatch], device: torch.device) -> StepCounts:
    """Count a step's targets, tokens and rows; every process has to call this.

    One sum over the processes carries all numbers. The bad rows themselves are sent only when
    there are any.
    """
    bad = [row for micro in micros for row in micro.bad]
    own = {
        "filled": sum(int(micro.batch.attention_mask.sum()) for micro in micros),
        "places": sum(micro.batch.attention_mask.numel() for micro in micros),
        "bad": len(bad),
        "seen": sum(micro.seen for micro in micros),
        "tokens": sum(micro.tokens for micro in micros),
    }
    own_targets = add_up([task.weights(micro.batch) for micro in micros])
    numbers = torch.tensor([*own_targets, *own.values()], dtype=torch.float64, device=device)
    sums = distributed.sum_over_processes(numbers).tolist()
    targets = sums[: len(own_targets)]
    total = dict(zip(own, sums[len(own_targets) :], strict=True))
    return StepCounts(
        targets=targets,
        filled=total["filled"],
        places=total["places"],
        seen=int(total["seen"]),
        tokens=total["tokens"],
        bad=gather_bad(bad) if total["bad"] else [],
    )


def add_up(rows: Sequence[Sequence[float]]) -> list[float]:
    """Return the sums of columns: of each objective's targets over the micro batches."""
    return [sum(column) for column in zip(*rows, strict=True)]


def gather_bad(bad: list[Bad]) -> list[Bad]:
    """Return the bad rows of all processes, in the order of ranks."""
    return [row for part in distributed.gather_objects(bad) for row in part]


def add_to_sums(sums: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Add values by name to running sums, without their graph."""
    for name, value in values.items():
        before = sums.get(name, torch.zeros_like(value, dtype=torch.float32))
        sums[name] = before + value.detach()


def weighted_loss(
    losses: dict[str, Tensor], targets: Sequence[float], shares: dict[str, float]
) -> Tensor:
    """Return the loss: each objective's sum over its targets, weighted by its share.

    Args:
        losses: loss sums by objective, of a micro batch.
        targets: of each objective in the whole step, in the order of ``losses``.
        shares: each objective's share of the loss.
    """
    terms: list[Tensor] = []
    for (key, loss), count in zip(losses.items(), targets, strict=True):
        term = shares[key] * loss / max(count, 1.0)
        terms.append(term.float())
    return torch.stack(terms).sum()


def step_means(
    sums: dict[str, Tensor], targets: Sequence[float], shares: dict[str, float]
) -> dict[str, float]:
    """Return the loss and the means of all sums over all processes.

    Args:
        sums: loss sums by objective, and further sums named ``objective/figure``, of this process;
            a figure may be a pair ``(2,)`` of a sum and its count.
        targets: of each objective over all processes, in the order of ``shares``.
        shares: each objective's share of the loss.
    """
    flat = torch.cat([value.detach().double().flatten() for value in sums.values()])
    totals = distributed.sum_over_processes(flat).tolist()
    targets_of = {key: max(n, 1.0) for key, n in zip(shares, targets, strict=True)}
    means: dict[str, float] = {}
    place = 0
    for name, value in sums.items():
        count = targets_of[name.partition("/")[0]]
        if value.numel() == 2:
            count = max(totals[place + 1], 1.0)
        means[name] = totals[place] / count
        place += value.numel()
    loss = sum(shares[key] * means[key] for key in shares)
    return {"loss": loss, **means}


class BestByError(UserError):
    """``train.best_by`` names no figure of validation."""

    setting = "train.best_by"


def check_best_by(name: str, objectives: Mapping[str, Any], validates: bool) -> None:
    """Check before training that validation will have a figure.

    Args:
        name: ``loss``, an objective, or ``objective/figure``.
        objectives: of the stage, by name.
        validates: whether the stage has validation rows.

    Raises:
        BestByError: validation will have no such figure, or nothing is validated.
    """
    names = ["loss"]
    for key, objective in objectives.items():
        names += [key, *(f"{key}/{figure}" for figure in objective.figures)]
    if name not in names:
        raise BestByError(
            f"train.best_by is {name!r}; this stage can choose by {', '.join(names)}",
            reason="unknown_figure",
        )
    if name != "loss" and not validates:
        raise BestByError(
            f"train.best_by is {name!r}, but there are no validation rows; expected "
            "data.validation beside it",
            reason="no_validation",
        )


def chosen_figure(figures: Mapping[str, float], name: str) -> float:
    """Return the figure that chooses the best model.

    Raises:
        BestByError: validation has no such figure.
    """
    if name not in figures:
        raise BestByError(
            f"train.best_by is {name!r}; validation has the figures {', '.join(figures)}"
        )
    return figures[name]


def is_better(figure: float, best: float | None, name: str) -> bool:
    """Return whether a figure is better than the best so far: losses fall, other figures rise.

    Args:
        figure: of this validation.
        best: of those before, None before the first.
        name: of the figure; an objective's further figures have a ``/`` in their names.
    """
    if best is None:
        return True
    return figure > best if "/" in name else figure < best


def even_out(micros: list[MicroBatch], collate: Collate) -> list[MicroBatch]:
    """Append blank micro batches until every process has the same number of them."""
    if distributed.world_size() == 1:
        return micros
    most = max(distributed.gather_objects(len(micros)))
    return micros + [collate([])[0] for _ in range(most - len(micros))]
