"""Averages of parameters and soft targets, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

from avllm.errors import UserError
from avllm.objectives._ema import Ema
from avllm.objectives._soft_targets import distilled_info_nce, soft_cross_entropy, soft_targets
from avllm.objectives.contrastive import symmetric_info_nce


def test_the_average_after_three_steps_by_hand() -> None:
    module = nn.Linear(1, 1, bias=False)
    module.weight.data.fill_(1.0)
    average = Ema({"a": module}, momentum=0.5)
    for value in (3.0, 5.0, -1.0):
        module.weight.data.fill_(value)
        average.update({"a": module})
    # 1 -> 2 -> 3.5 -> 1.25
    assert average.weights("a")["weight"].item() == 1.25
    assert functional_call(module, average.weights("a"), (torch.ones(1, 1),)).item() == 1.25
    assert module(torch.ones(1, 1)).item() == -1.0


def test_what_does_not_change_is_its_average_to_the_bit() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5))
    average = Ema({"a": module}, momentum=0.995)
    for _ in range(20):
        average.update({"a": module})
    assert average.weights("a").keys() == dict(module.named_parameters()).keys()
    assert all(torch.equal(average.weights("a")[n], p) for n, p in module.named_parameters())
    assert not list(average.parameters()), "buffers: no rule can train them"
    assert len(average.state_dict()) == 4


def test_modules_are_kept_apart_by_name() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(3, 3)
    average = Ema({"a": first, "a.b": second}, momentum=0.0)
    assert average.weights("a.b")["weight"].shape == (3, 3)
    with pytest.raises(ValueError, match="momentum is 1"):
        Ema({"a": first}, momentum=1)


def test_half_precision_is_refused() -> None:
    module = nn.Linear(2, 2).bfloat16()
    average = Ema({"a": module}, momentum=0.995)
    with pytest.raises(UserError, match="bfloat16"):
        average.update({"a": module})


def test_soft_targets_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3.0), 5.0]])
    excluded = torch.tensor([[False, False, True]])
    targets = soft_targets(logits, torch.tensor([0]), excluded, 0.4)
    # the teacher says 1/4 and 3/4
    assert targets.tolist()[0] == pytest.approx([0.6 + 0.4 * 0.25, 0.4 * 0.75, 0.0])
    loss = soft_cross_entropy(
        torch.tensor([[math.log(1.0), math.log(4.0), 9.0]]), targets, excluded
    )
    assert loss.item() == pytest.approx(-0.7 * math.log(0.2) - 0.3 * math.log(0.8), abs=1e-6)


def test_without_softness_it_is_info_nce() -> None:
    torch.manual_seed(0)
    media, text, other, another = nn.functional.normalize(
        torch.randn(4, 6, 5, dtype=torch.float64), dim=-1
    )
    ids = torch.tensor([1, 2, 3, 2, 5, 6])
    plain = symmetric_info_nce(media, text, ids, 7.0)
    hard = distilled_info_nce((media, text), (other, another), ids, 7.0, 0.0)
    soft = distilled_info_nce((media, text), (other, another), ids, 7.0, 0.4)
    torch.testing.assert_close(hard[0], plain[0], rtol=0, atol=1e-12)
    assert hard[1] == plain[1] == soft[1]
    assert abs(soft[0] - plain[0]) > 1e-3


def test_no_rows_give_a_zero_on_the_graph() -> None:
    media = torch.zeros(0, 4, requires_grad=True)
    none = torch.zeros(0, 4)
    loss, hits = distilled_info_nce(
        (media, none), (none, none), torch.zeros(0, dtype=torch.long), 3.0, 0.4
    )
    loss.backward()
    assert loss.item() == hits.item() == 0.0
