"""The progress line keeps its time left in a narrow terminal; names of figures in trackers."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from avllm.training.progress import keep_until, progress_bar, tracked

FIGURES = "loss 2.3456  contrastive/hits 0.250  lr 3.00e-04  1,234 tokens/s  data-wait 12%"


@pytest.mark.parametrize("width", [60, 80, 160])
def test_the_time_left_is_kept(width: int) -> None:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    bar = progress_bar(console)
    bar.add_task("train", total=20_000, completed=1234, figures=FIGURES)
    with console.capture() as captured:
        console.print(bar.get_renderable())
    (line,) = captured.get().splitlines()
    assert len(line) <= width
    assert line.startswith("1234/20000")
    assert re.search(r"[-\d]+:[-\d]+:[-\d]+\s*$", line)  # the time left, not known yet
    assert "loss 2.3456" in line
    assert (FIGURES in line) == (width == 160)


def test_a_loss_is_a_file_beside_the_figures_of_its_objective() -> None:
    """MLflow's file store writes a file for each name, so none may be the folder of another."""
    figures = {
        "loss": 3.0,
        "contrastive": 2.0,
        "contrastive/hits": 0.5,
        "lr": 0.1,
        "grad_norm": 1.0,
        "padding": 0.1,
        "seconds": 1.0,
        "tokens_per_s": 10.0,
        "data_wait": 0.0,
        "validation/loss": 3.0,
        "validation/contrastive": 2.0,
        "validation/left_out": 0.0,
    }
    names = tracked(figures)
    assert names["contrastive/loss"] == 2.0
    assert names["validation/contrastive/loss"] == 2.0
    kept = figures.keys() - {"contrastive", "validation/contrastive"}
    assert kept <= names.keys()
    assert len(names) == len(figures)
    assert not [a for a in names for b in names if b.startswith(f"{a}/")]


def test_lines_that_are_no_figures_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{}\n[1]\n3\n{"step": "x"}\n{"step": 2}\n{"step": 9}\n{"st')
    keep_until(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
