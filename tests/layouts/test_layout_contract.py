"""Every layout keeps its promise: each real token lies exactly once, by the grids alone."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from avllm.layouts.base import Layout
from avllm.registry import build, choices
from avllm.tokens import Grid

EVERY = pytest.mark.parametrize("name", choices("layouts"))


def grid(steps: int, tokens: int, seconds: float, start: float = 0.0) -> Grid:
    edges = start + torch.arange(steps + 1) * seconds
    return Grid(
        torch.stack([edges[:-1], edges[1:]], 1), torch.ones(steps, tokens, dtype=torch.bool)
    )


def make(name: str, **options: object) -> Layout:
    layout: Layout = build("layouts", {"type": name, **options})
    return layout


@EVERY
def test_every_real_token_has_one_place(name: str) -> None:
    grids = {"video": grid(4, 3, 0.5), "audio": grid(10, 1, 0.2), "video.4": grid(2, 2, 1.0)}
    grids["video"].mask[1, 2] = False
    assert Counter(make(name).order(grids)) == {"video": 11, "audio": 10, "video.4": 4}


@EVERY
def test_absent_and_empty_streams_take_no_place(name: str) -> None:
    silent = Grid(torch.zeros(2, 2), torch.zeros(2, 1, dtype=torch.bool))
    assert make(name).order({"video": grid(2, 2, 0.5), "audio": silent}) == ["video"] * 4
    assert make(name).order({}) == []


@EVERY
def test_the_order_is_a_function_of_the_grids_alone(name: str) -> None:
    grids = {"video": grid(4, 2, 0.25), "audio": grid(8, 1, 0.125)}
    assert make(name).order(grids) == make(name).order(
        {k: Grid(g.span.clone(), g.mask.clone()) for k, g in grids.items()}
    )


def test_concat_puts_one_stream_behind_the_other() -> None:
    grids = {"audio": grid(2, 1, 1.0), "video": grid(2, 2, 1.0)}
    assert make("concat").order(grids) == ["audio"] * 2 + ["video"] * 4
    assert make("concat", streams=["video"]).order(grids) == ["video"] * 4 + ["audio"] * 2


def test_interleave_follows_the_clock() -> None:
    grids = {"audio": grid(4, 1, 0.5), "video": grid(2, 2, 1.0)}
    expected = ["video", "video", "audio", "audio", "video", "video", "audio", "audio"]
    assert make("interleave").order(grids) == expected
    late = {"audio": grid(2, 1, 0.5, start=0.7), "video": grid(3, 1, 0.5)}
    assert make("interleave").order(late) == ["video", "video", "audio", "video", "audio"]


def test_interleave_takes_equal_seconds_for_equal() -> None:
    grids = {"audio": grid(3, 1, 0.1, start=0.1), "video": grid(1, 1, 0.1, start=0.3)}
    assert make("interleave").order(grids) == [
        "audio",
        "audio",
        "video",
        "audio",
    ]  # 0.1 + 0.2 is 0.3
    assert make("interleave", streams=["audio"]).order(grids) == [
        "audio",
        "audio",
        "audio",
        "video",
    ]
