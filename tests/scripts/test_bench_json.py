"""Every bench runs, and with `--json` its last line is one JSON object."""

from __future__ import annotations

import contextlib
import json
import runpy
import sys
from pathlib import Path

import pytest
from tiny_runs import together

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "bench"
SMALL = {
    "cache.py": ("--tiny", "--steps", "1"),
    "decode.py": ("--turns", "1", "--memory", "2"),
    "manifest.py": ("--rows", "500", "--workers", "0"),
    "packing.py": ("--tiny", "--turns", "1", "--rows", "6"),
    "step.py": ("--tiny", "--pairs", "1"),
}
RATIOS = {
    "cache.py": ("faster", "bar"),
    "decode.py": ("faster_than_plain", "time_over_limit"),
    "manifest.py": ("first", "again"),
    "packing.py": ("faster", "tokens_per_s"),
    "step.py": ("ratio", "ratio_hf"),
}


def call(script: Path, arguments: tuple[str, ...], output: Path) -> None:
    """Run a script in this (child) process; what it prints goes to a file."""
    sys.argv = [str(script), *arguments]
    with output.open("w") as file, contextlib.redirect_stdout(file):
        runpy.run_path(str(script), run_name="__main__")


def test_every_bench_is_among_them() -> None:
    assert {path.name for path in SCRIPTS.glob("*.py")} == SMALL.keys() == RATIOS.keys()


@pytest.mark.parametrize("name", SMALL)
def test_its_last_line_is_one_json_object(name: str, tmp_path: Path) -> None:
    if name == "decode.py":
        pytest.importorskip("decord")  # the plain loop that it is held against
    together(call, SCRIPTS / name, (*SMALL[name], "--json"), tmp_path / "output", ranks=1)
    lines = (tmp_path / "output").read_text().splitlines()
    figures = json.loads(lines[-1])
    assert figures.keys() >= {*RATIOS[name], "environment"}
    assert len(lines) > 1, "a person gets words before it"
    assert not any(line.startswith("{") for line in lines[:-1])
