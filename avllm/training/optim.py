"""Choose the parameters that train and their learning rates; build the optimizer and schedule."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import DistributedType
from rich.table import Table
from torch import nn

from avllm.config_errors import ConfigError
from avllm.errors import UserError
from avllm.models.building.adapter_config import SET_NAME, set_of
from avllm.training.muon import Muon

Rules = Sequence[tuple[str, float | None]]


class RuleError(UserError):
    """The rules of ``trainable`` do not fit the parameters."""

    setting = "trainable"


@dataclass
class Share:
    """Record the parameters that one rule takes and their learning rate.

    Attributes:
        pattern: searched (``re.search``) in the parameter's name.
        lr: its peak learning rate, None = frozen.
        names: the parameters that no earlier rule took.
    """

    pattern: str
    lr: float | None
    names: list[str] = field(default_factory=list)


def assign(names: Iterable[str], rules: Rules) -> list[Share]:
    """Give each parameter to the first rule that matches its name.

    Raises:
        RuleError: a parameter that no rule matches, or a rule that gets no parameter.
    """
    shares = [Share(pattern, lr) for pattern, lr in rules]
    names = list(names)
    for name in names:
        taker = next((share for share in shares if re.search(share.pattern, name)), None)
        if taker is None:
            patterns = [share.pattern for share in shares]
            raise RuleError(
                f"no rule of `trainable` matches the parameter {name!r}; rules: {patterns}. "
                "Add a rule for it, e.g. end the list with ['.*', null] to freeze the rest"
            )
        taker.names.append(name)
    for share in shares:
        if not share.names:
            raise RuleError(_why_empty(share, names))
    return shares


def _why_empty(share: Share, names: list[str]) -> str:
    matched = [n for n in names if re.search(share.pattern, n)]
    if matched:
        return (
            f"the rule {share.pattern!r} of `trainable` gets nothing: the rules above it have "
            f"taken all {len(matched)} parameters that it matches (e.g. {matched[0]!r}). Move it "
            "up or delete it"
        )
    heads = sorted({".".join(n.split(".")[:2]) for n in names})
    return (
        f"the rule {share.pattern!r} of `trainable` matches no parameter; names begin with "
        f"{', '.join(heads)}"
    )


def parameter_name(name: str) -> str:
    """Return the name that rules and tables use: the task's ``model.`` is left out."""
    return name.removeprefix("model.")


def named_parameters(task: nn.Module) -> dict[str, nn.Parameter]:
    """Return all parameters of a task by the names that the rules use."""
    return {parameter_name(name): p for name, p in task.named_parameters()}


def apply_rules(task: nn.Module, rules: Rules) -> list[Share]:
    """Freeze and unfreeze the task's parameters by the rules; return what each rule took.

    Raises:
        RuleError: see :func:`assign`; also when a rule trains quantized weights, which cannot be.
    """
    parameters = named_parameters(task)
    shares = assign(parameters, rules)
    for share in shares:
        for name in share.names:
            p = parameters[name]
            if share.lr is not None and not p.is_floating_point():
                raise RuleError(
                    f"the rule {share.pattern!r} trains {name!r}, which is stored as {p.dtype}; "
                    "expected floating point. Freeze it"
                )
            p.requires_grad_(share.lr is not None)
    return shares


def check_lora_trains(shares: Sequence[Share], names: Sequence[str], active: Sequence[str]) -> None:
    """Make sure that the LoRA sets that a stage adds train, and that no idle set does.

    Args:
        shares: what trains. names: of the sets that the stage adds. active: of those that answer.

    Raises:
        RuleError: a set that is added does not train, or one trains that is not active.
    """
    trained: set[str | None] = set()
    for share in shares:
        if share.lr is not None:
            trained.update(set_of(name) for name in share.names)
    unused = sorted(name for name in trained if name is not None and name not in active)
    if unused:
        raise RuleError(
            f"a rule of `trainable` trains the LoRA set {unused[0]!r}, which is not active: it "
            f"gets no gradient, and weight decay would change it; name the set that trains, as in "
            f"['lora_.*\\.{active[0] if active else 'NAME'}', 1e-4]"
        )
    idle = [name for name in names if name not in trained]
    if idle:
        prefix = _prefix_of(shares, idle[0])
        raise RuleError(
            f"lora or peft is given, but no rule of `trainable` trains its set {idle[0]!r}; add "
            f"['{prefix}', 1e-4], or ['{prefix}.*\\.{idle[0]}', 1e-4] for this set alone, in front"
        )


def _prefix_of(shares: Sequence[Share], name: str) -> str:
    """Return the beginning of the names of a set's tensors: ``lora_``, ``ia3_``, ..."""
    for share in shares:
        for parameter in share.names:
            match = SET_NAME.search(parameter)
            if match and match.group(2) == name:
                return match.group(1).lstrip(".").partition("_")[0] + "_"
    return "lora_"


def check_objectives_train(shares: Sequence[Share], objectives: Iterable[str]) -> None:
    """Make sure that no objective keeps the random weights that it starts with.

    Args:
        shares: what trains. objectives: by name, as in ``objectives.NAME.``.

    Raises:
        RuleError: ``frozen_objective``: an objective has parameters, and every one is frozen.
    """
    for objective in objectives:
        rates = set()
        for share in shares:
            if any(name.startswith(f"objectives.{objective}.") for name in share.names):
                rates.add(share.lr)
        if rates == {None}:
            raise RuleError(
                f"the rules of `trainable` freeze objective {objective}, whose weights are random "
                f"at the start; add ['^objectives\\.{objective}\\.', 1e-4] in front of the rule "
                "that freezes the rest",
                reason="frozen_objective",
            )


def rule_table(task: nn.Module, shares: Sequence[Share]) -> Table:
    """Return the table printed at the start: rule, tensors, parameters, learning rate."""
    parameters = named_parameters(task)
    table = Table(title="what trains")
    table.add_column("rule")
    for title in ("tensors", "parameters", "learning rate"):
        table.add_column(title, justify="right")
    for share in shares:
        count = sum(_numel(parameters[n]) for n in share.names)
        rate = "frozen" if share.lr is None else f"{share.lr:g}"
        table.add_row(share.pattern, str(len(share.names)), f"{count:,}", rate)
    return table


def _numel(p: nn.Parameter) -> int:
    # ZeRO-3 leaves an empty shell where a parameter was, with its size as an attribute.
    return int(getattr(p, "ds_numel", p.numel()))


def parameter_groups(
    task: nn.Module, shares: Sequence[Share], weight_decay: float
) -> list[dict[str, Any]]:
    """Return the optimizer's groups, one a rule and kind of parameter.

    Biases, norms and scalars (tensors of fewer than two axes) do not decay.
    """
    parameters = named_parameters(task)
    groups = []
    for share in shares:
        if share.lr is None:
            continue
        for decays in (True, False):
            of_rule = [parameters[name] for name in share.names]
            chosen = [p for p in of_rule if (p.dim() >= 2) is decays]
            if chosen:
                decay = weight_decay if decays else 0.0
                rates = {"lr": share.lr, "peak_lr": share.lr, "weight_decay": decay}
                groups.append({"params": chosen, "matrices": decays, **rates})
    if not groups:
        raise RuleError("no rule of `trainable` has a learning rate: nothing would train")
    return groups


def build_optimizer(
    task: nn.Module,
    shares: Sequence[Share],
    *,
    weight_decay: float,
    betas: tuple[float, float],
    kind: str = "adamw",
) -> torch.optim.Optimizer:
    """Build AdamW (Loshchilov & Hutter 2019) or Muon over the parameters that train."""
    groups = parameter_groups(task, shares, weight_decay)
    return (
        Muon(groups, betas=betas)
        if kind == "muon"
        else torch.optim.AdamW(groups, lr=0.0, betas=betas)
    )


def lr_factor(
    step: int, *, total: int, warmup: int, schedule: str = "cosine", floor: float = 0.0
) -> float:
    """Return the share of the peak learning rate at optimizer step ``step`` (from 0).

    It grows linearly from 1/warmup over ``warmup`` steps, then stays ``constant`` or follows half
    a ``cosine`` down to ``floor`` at ``total``. It depends on the step alone, so that a resumed run
    needs no state of a scheduler.
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    if schedule != "cosine":
        raise ValueError(f"schedule is {schedule!r}; choose cosine or constant")
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def check_whole_matrices(kind: str, distributed_type: DistributedType) -> None:
    """Refuse Muon where a launcher cuts matrices up.

    Raises:
        ConfigError: ``kind`` is ``muon`` under DeepSpeed or FSDP.
    """
    cuts = distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)
    if kind == "muon" and cuts:
        raise ConfigError(
            f"train.optimizer is muon under {distributed_type.value}, which cuts matrices up; "
            "expected whole ones: take adamw, or launch without it (train/launch/ddp.yaml)"
        )


def peak_lr(optimizer: Any) -> float:
    """Return the largest peak learning rate of all groups."""
    return max(group["peak_lr"] for group in optimizer.param_groups)


def set_lr(optimizer: Any, factor: float) -> None:
    """Set every group to its peak times ``factor``."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
