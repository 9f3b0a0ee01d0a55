"""VLAP's assignment: transport to the stated masses, and the same in parts as at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import make_world

from avllm.config_model import ModelConfig
from avllm.data.dataset import SampleDataset
from avllm.models.building.placeholders import load_tokenizer
from avllm.models.modeling_avllm import AVLLM
from avllm.models.processing_avllm import AVProcessor
from avllm.objectives import assignment
from avllm.objectives.assignment import Assignment, LogSumExp, assign, potentials
from avllm.training.start import Parts, padding

torch.set_num_threads(1)


def problem(vectors: int, words: int, width: int = 8) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = F.normalize(torch.randn(vectors, width, generator=generator), dim=-1)
    table = F.normalize(torch.randn(words, width, generator=generator), dim=-1)
    shares = torch.rand(words, generator=generator) + 0.1
    return x, table, shares / shares.sum()


def plan(x: torch.Tensor, table: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    rows, columns = potentials(x, table, shares, 0.05, 200)
    return (x @ table.T / 0.05 + rows[:, None] + columns).exp()


def test_masses_are_met() -> None:
    x, table, shares = problem(6, 50)
    made = plan(x, table, shares)
    assert torch.allclose(made.sum(1), torch.full((6,), 1 / 6), atol=1e-4)
    assert torch.allclose(made.sum(0), shares, atol=1e-4)


def test_two_pairs_by_hand() -> None:
    """Two vectors, each equal to one of two words: each is assigned to its own."""
    table = torch.eye(2)
    mean = assign(table, table, torch.tensor([0.5, 0.5]), 0.05, 3)
    share = torch.sigmoid(torch.tensor(1 / 0.05))
    assert torch.allclose(mean, torch.tensor([[share, 1 - share], [1 - share, share]]), atol=1e-6)


def test_words_in_parts_are_words_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x, table, shares = problem(6, 50)
    x.requires_grad_()
    at_once = torch.logsumexp(x @ table.T, 1)
    (expected,) = torch.autograd.grad(at_once.sum(), x)
    dense = assign(x.detach(), table, shares, 0.05, 3)
    monkeypatch.setattr(assignment, "CHUNK", 7)
    in_parts = LogSumExp.apply(x, table)
    (seen,) = torch.autograd.grad(in_parts.sum(), x)
    assert torch.allclose(in_parts, at_once, atol=1e-6)
    assert torch.allclose(seen, expected, atol=1e-6)
    assert torch.allclose(assign(x.detach(), table, shares, 0.05, 3), dense, atol=1e-6)


def test_large_scores_stay_finite_in_half_the_precision() -> None:
    x, table, shares = problem(6, 50)
    made = assign((100 * x).bfloat16().float(), table.bfloat16().float(), shares, 0.05, 3)
    assert torch.isfinite(made).all()


def test_autocast_does_not_round_scores(tmp_path: Path) -> None:
    """Scores are divided by 0.05, so that eight bits of a cosine would shift an assignment."""
    world = make_world(tmp_path, clips=4)
    description = ModelConfig.model_validate(world.model)
    tokenizer, ids = load_tokenizer(description)
    model = AVLLM.from_backbones(description, ids)
    parts = Parts(model, AVProcessor.from_model(model, tokenizer), [])
    dataset = SampleDataset([str(world.captions)], parts.processor)
    batch = padding(parts, blanks=False)([dataset[number] for number in range(4)])[0].batch
    objective = Assignment(model).eval()
    with torch.no_grad(), model.shared_media():
        exact = float(objective(model, batch)[0])
        with torch.autocast("cpu", torch.bfloat16):  # of the same media tokens
            assert float(objective(model, batch)[0]) == pytest.approx(exact, rel=1e-5)
