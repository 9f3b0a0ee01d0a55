"""Hooks and buffers of objectives: a part from a temporary folder, averages in a run, kills."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import World, make_world, settings
from tiny_runs import difference, kill_after, losses, rows, run, weights
from torch import Tensor

from avllm.models.modeling_avllm import AVLLM
from avllm.training.task import load_objectives, own_state

PART = '''
"""An objective with both hooks, a queue and random numbers."""

import json
from pathlib import Path

import torch

from avllm.distributed import gather_with_grad
from avllm.objectives.next_token import NextToken

LOG = Path(__file__).with_name("log.jsonl")


class Queued(NextToken):
    """Weigh the loss with what the hooks have left behind."""

    def __init__(self, model):
        super().__init__(model)
        self.register_buffer("queue", torch.zeros(8))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.seen, self.counted = [], 0

    def note(self, event, **values):
        with LOG.open("a") as file:
            file.write(json.dumps({"event": event, **values}) + "\\n")

    def weight(self, batch):
        self.counted += 1
        return super().weight(batch)

    def before_step(self, model, batches):
        self.seen = list(batches)
        grads = [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parameters()]
        graph = torch.is_grad_enabled()
        counts = {"batches": len(batches), "counted": self.counted}
        self.note("before", **counts, grads=any(grads), graph=graph)
        values = torch.stack(
            [torch.rand(()) + model.media_tokens(b)["video"].x.mean() for b in batches]
        )
        new, _ = gather_with_grad(values)
        self.queue.copy_(torch.cat([self.queue, new])[-8:])

    def forward(self, model, batch):
        if model.training:
            assert any(batch is other for other in self.seen), "the batches that before_step saw"
        loss, figures = super().forward(model, batch)
        return loss * (1 + self.queue.mean()), figures

    def after_step(self, model):
        self.calls += 1
        self.note("after", weight=float(next(model.connector.parameters()).double().sum()))
        new, _ = gather_with_grad(torch.rand(1))
        self.queue.mul_(1 + 0.1 * new.mean())
'''


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A tiny world for all tests of this file."""
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The objective, as a YAML names it."""
    (tmp_path / "throwaway.py").write_text(PART)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "throwaway:Queued"


def stage(world: World, folder: Path, part: str, **changes: Any) -> dict[str, Any]:
    """Six steps of two micro batches."""
    step = {"train__max_steps": 6, "train__accumulate": 2, "train__warmup": 0}
    asked = settings(world, folder, **step, **{"data__train": str(world.questions), **changes})
    asked["objectives"] = [{"type": part}]
    return asked


def events(folder: Path) -> list[dict[str, Any]]:
    """What the part has written down."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_hooks_surround_each_optimizer_step(world: World, part: str, tmp_path: Path) -> None:
    run(stage(world, tmp_path / "run", part))
    log = events(tmp_path)
    assert [e["event"] for e in log] == ["before", "after"] * 6
    before, after = log[::2], log[1::2]
    assert {e["batches"] for e in before} == {2}
    assert [e["counted"] for e in before] == [2, 4, 6, 8, 10, 12], "targets were counted, once"
    assert not any(e["grads"] or e["graph"] for e in before)
    assert len({e["weight"] for e in after}) == 6, "the optimizer has stepped each time"
    saved = load_file(tmp_path / "run" / "objectives.safetensors")
    assert saved["Queued.calls"].item() == 6


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_run_with_hooks_goes_on_bit_identically(
    world: World, part: str, tmp_path: Path, ranks: int
) -> None:
    straight = run(stage(world, tmp_path / "straight", part), ranks=ranks)
    asked = stage(world, tmp_path / "run", part, train__save_every=2)
    kill_after(asked, 4, ranks=ranks)
    found = run(asked, ranks=ranks)
    assert rows(found) == rows(straight)
    assert difference(weights(found), weights(straight)) == 0.0
    assert difference(objectives_of(found), objectives_of(straight)) == 0.0


def objectives_of(folder: Path) -> dict[str, Tensor]:
    """The objectives' parameters and buffers."""
    return load_file(folder / "objectives.safetensors")


def momentum(world: World, folder: Path, **changes: Any) -> dict[str, Any]:
    """Five steps of an alignment with averaged soft targets."""
    asked = settings(
        world, folder, "align", train__max_steps=5, train__warmup=0, train__batch_size=4, **changes
    )
    asked["objectives"][0] |= {
        "momentum": 0.9,
        "soft": 0.4,
        "pairs": ["video-text", "av-text", "video-audio"],
    }
    return asked


def test_the_average_of_a_run_is_that_of_its_weights_by_hand(world: World, tmp_path: Path) -> None:
    found = run(momentum(world, tmp_path / "run", train__save_every=1, train__keep=9))
    points = [torch.load(found / "checkpoints" / f"step_{n}" / "trainable.pt") for n in range(1, 6)]
    states = [point["model"] for point in points]
    name = next(n for n in states[0] if n.startswith("model.connector.0") and n.endswith("weight"))
    buffer = "objectives.contrastive.average." + name.removeprefix("model.").replace(".", "/")
    for before, after in zip(states, states[1:], strict=False):
        expected = 0.9 * before[buffer].double() + 0.1 * after[name].double()
        torch.testing.assert_close(after[buffer].double(), expected, rtol=0, atol=1e-7)
        assert not torch.equal(after[buffer], after[name])
    saved = objectives_of(found)
    assert torch.equal(saved[buffer.removeprefix("objectives.")], states[-1][buffer])
    loaded = own_state(load_objectives(AVLLM.from_pretrained(str(found)), found))
    assert difference(dict(loaded), saved) == 0.0


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_run_with_averages_goes_on_bit_identically(
    world: World, tmp_path: Path, ranks: int
) -> None:
    straight = run(momentum(world, tmp_path / "straight"), ranks=ranks)
    asked = momentum(world, tmp_path / "run", train__save_every=2)
    kill_after(asked, 3, ranks=ranks)
    found = run(asked, ranks=ranks)
    assert rows(found) == rows(straight)
    assert difference(weights(found), weights(straight)) == 0.0
    assert difference(objectives_of(found), objectives_of(straight)) == 0.0


def test_averages_over_two_processes_are_those_of_one(world: World, tmp_path: Path) -> None:
    one = run(momentum(world, tmp_path / "one"))
    two = run(
        momentum(world, tmp_path / "two")
        | {"train": {**momentum(world, tmp_path)["train"], "batch_size": 2}},
        2,
    )
    assert losses(one) == pytest.approx(losses(two), abs=1e-5)
    assert difference(objectives_of(one), objectives_of(two)) < 1e-5
