"""The overhead bench runs and compares equal work; the figure itself is not a test."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from avllm.data.collate import collate

PATH = Path(__file__).resolve().parents[2] / "scripts" / "bench" / "step.py"


@pytest.fixture(scope="module")
def bench() -> Any:
    spec = importlib.util.spec_from_file_location("bench_step", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_measures(bench: Any) -> None:
    figures = bench.measure(bench.TINY, batch_size=2, pairs=1)
    assert figures["ratio"] > 0
    assert set(figures["milliseconds"]) == {"ours", "bare", "bare_hf"}
    assert figures["length"] == figures["media_tokens"] + bench.TINY["text"]


def test_both_sides_do_the_same_work(bench: Any) -> None:
    """Fed the very same embeddings, the bare losses are ours, and LoRA gets the same gradients."""
    torch.manual_seed(0)
    model = bench.build(bench.TINY)
    batch = collate([bench.make_row(model, bench.TINY, i) for i in range(3)], pad_id=0)
    embeds = model.embed(batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn", lambda *_: embeds.detach())
        losses = bench.steps(model, batch)
    values = {name: loss() for name, loss in losses.items()}
    assert values["bare"].item() == pytest.approx(values["ours"].item(), rel=1e-5)
    assert values["bare_hf"].item() == pytest.approx(values["ours"].item(), rel=1e-5)
