"""Muon: orthogonal steps for matrices, AdamW for the rest, and a state that resumes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from avllm.training.muon import Muon, orthogonalise, share_out
from avllm.training.optim import apply_rules, build_optimizer


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 24), (2, 24, 8)])
def test_orthogonalised_matrices_stretch_no_direction(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape), iterations=5).float())
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_what_is_no_matrix_goes_as_with_adamw() -> None:
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(7))
    theirs = nn.Parameter(ours.detach().clone())
    groups = {"lr": 0.01, "weight_decay": 0.1}
    first = Muon([{"params": [ours], "matrices": False, **groups}], betas=(0.9, 0.98))
    second = torch.optim.AdamW([theirs], betas=(0.9, 0.98), **groups)
    for _ in range(5):
        gradient = torch.randn(7)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        first.step()
        second.step()
    torch.testing.assert_close(ours, theirs)


def test_matrices_step_by_the_learning_rate_whatever_the_gradients_size() -> None:
    torch.manual_seed(0)
    sizes = []
    for scale in (1e-6, 1e3):
        p = nn.Parameter(torch.zeros(16, 32))
        optimizer = Muon([{"params": [p], "matrices": True, "lr": 0.01, "weight_decay": 0.0}])
        p.grad = scale * torch.randn(16, 32)
        optimizer.step()
        sizes.append(float(p.detach().square().mean().sqrt()))
    assert sizes == pytest.approx(
        [0.01 * 0.2 * (16 / 16) ** 0.5] * 2, rel=0.25
    )  # rms 1/sqrt(32) times sqrt(32)


def test_a_saved_state_goes_on_bit_by_bit() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    shares = apply_rules(model, [(".*", 1e-2)])

    def optimizer(of: nn.Module) -> torch.optim.Optimizer:
        made = build_optimizer(
            of, apply_rules(of, [(".*", 1e-2)]), weight_decay=0.1, betas=(0.9, 0.98), kind="muon"
        )
        for group in made.param_groups:
            group["lr"] = group["peak_lr"]
        return made

    def step(of: nn.Module, by: torch.optim.Optimizer, seed: int) -> None:
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
        of.zero_grad()
        of(x).square().sum().backward()
        by.step()

    assert shares
    whole = optimizer(model)
    step(model, whole, 1)
    again = copy.deepcopy(model)
    resumed = optimizer(again)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    step(model, whole, 2)
    step(again, resumed, 2)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_matrices_are_shared_out_by_what_they_cost() -> None:
    assert share_out([9, 1, 4, 5], 2) == [[0, 1], [2, 3]]
    shares = share_out([7, 7, 3, 2, 2, 1], 3)
    assert sorted(n for share in shares for n in share) == list(range(6))
    assert max(sum([7, 7, 3, 2, 2, 1][n] for n in share) for share in shares) == 8
