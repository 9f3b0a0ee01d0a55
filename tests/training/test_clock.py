"""What `data_wait` says: of training alone, and of the process that waits longest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tiny import make_world, settings
from tiny_runs import rows, run

from avllm.training import progress, trainer
from avllm.training.points.store import ResumePoints
from avllm.training.progress import Clock


def test_pauses_do_not_count_and_the_longest_wait_does(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(progress.distributed, "gather_objects", lambda own: [own, 0.1])
    clock = Clock()
    clock.waiting(1.0)
    clock.tokens = 40
    now[0] = 3.0
    with clock.paused():
        now[0] = 103.0
    now[0] = 104.0
    assert clock.read() == {"tokens_per_s": 10.0, "data_wait": 0.25, "seconds": 4.0}
    clock.waiting(0.1)
    now[0] = 106.0
    assert clock.read() == {"tokens_per_s": 0.0, "data_wait": 0.1, "seconds": 2.0}, (
        "another process waited longer"
    )


def test_validation_and_saving_are_pauses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paused, seen = [False], tmp_path / "seen"  # a file: the run is a child process

    class Watched(Clock):
        @contextmanager
        def paused(self) -> Iterator[None]:
            paused[0] = True
            with super().paused():
                yield
            paused[0] = False

    def watched(owner: Any, name: str) -> None:
        method = getattr(owner, name)

        def call(*args: Any) -> None:
            with seen.open("a") as file:
                file.write(f"{name} {paused[0]}\n")
            method(*args)

        monkeypatch.setattr(owner, name, call)

    monkeypatch.setattr(trainer, "Clock", Watched)
    watched(trainer.Trainer, "validate")
    watched(ResumePoints, "save")
    world = make_world(tmp_path / "world", clips=2)
    changes = {
        "data__validation": str(world.questions),
        "train__validate_every": 2,
        "train__save_every": 2,
    }
    folder = run(settings(world, tmp_path / "run", **changes))
    assert seen.read_text().splitlines() == ["validate True", "save True"] * 2
    assert all(0 <= row["data_wait"] <= 1 for row in rows(folder) if "data_wait" in row)
