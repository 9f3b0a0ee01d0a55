"""Rules, groups and the schedule."""

from __future__ import annotations

import math

import pytest
from torch import nn

from avllm.training.optim import (
    RuleError,
    apply_rules,
    assign,
    lr_factor,
    parameter_groups,
    rule_table,
)


class Small(nn.Module):
    """A task with a model and an objective."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"connector": nn.Linear(2, 3), "llm": nn.Linear(3, 3)})
        self.objectives = nn.ModuleDict({"x": nn.Linear(1, 1)})


def test_the_first_rule_that_matches_wins() -> None:
    shares = assign(["a.weight", "a.bias", "b.weight"], [("bias", None), ("^a", 1.0), (".*", 2.0)])
    assert [s.names for s in shares] == [["a.bias"], ["a.weight"], ["b.weight"]]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("^connector", 1.0)], "no rule of `trainable` matches the parameter 'llm.weight'"),
        ([("connectr", 1.0), (".*", None)], "matches no parameter; names begin with connector"),
        ([(".*", None), ("^llm", 1.0)], "rules above it have taken all 2 parameters"),
    ],
)
def test_rules_that_do_not_fit_are_errors(
    rules: list[tuple[str, float | None]], message: str
) -> None:
    with pytest.raises(RuleError, match=message):
        apply_rules(Small(), rules)


def test_groups_and_table() -> None:
    task = Small()
    shares = apply_rules(task, [("^connector", 1e-3), ("^objectives", 1e-2), (".*", None)])
    assert not task.model["llm"].weight.requires_grad
    groups = parameter_groups(task, shares, 0.1)
    assert [(g["peak_lr"], g["weight_decay"]) for g in groups] == [
        (1e-3, 0.1),
        (1e-3, 0.0),
        (1e-2, 0.1),
        (1e-2, 0.0),
    ]
    assert rule_table(task, shares).row_count == 3
    with pytest.raises(RuleError, match="nothing would train"):
        parameter_groups(task, apply_rules(task, [(".*", None)]), 0.1)


def test_the_schedule_is_a_function_of_the_step() -> None:
    def factor(step: int) -> float:
        return lr_factor(step, total=10, warmup=2)

    assert factor(0) == 0.5
    assert factor(1) == factor(2) == 1.0
    assert factor(6) == pytest.approx(0.5)
    assert factor(9) == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))
    assert lr_factor(7, total=10, warmup=0, schedule="constant") == 1.0
    assert lr_factor(10, total=10, warmup=0, floor=0.1) == pytest.approx(0.1)
