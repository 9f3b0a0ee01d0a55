"""Every bench runs, and with `--json` its last line is one JSON object; the figures themselves are no test."""

from __future__ import annotations

import contextlib
import json
import runpy
import sys
from pathlib import Path

import pytest
from tiny_runs import together

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
SMALL = {
    "bench_cache.py": ("--tiny", "--steps", "1"),
    "bench_decode.py": ("--turns", "1", "--memory", "2"),
    "bench_manifest.py": ("--rows", "500", "--workers", "0"),
    "bench_packing.py": ("--tiny", "--turns", "1", "--rows", "6"),
    "bench_step.py": ("--tiny", "--pairs", "1"),
}
RATIOS = {
    "bench_cache.py": ("faster", "bar"),
    "bench_decode.py": ("faster_than_plain", "time_over_limit"),
    "bench_manifest.py": ("first", "again"),
    "bench_packing.py": ("faster", "tokens_per_s"),
    "bench_step.py": ("ratio", "ratio_hf"),
}


def call(script: Path, arguments: tuple[str, ...], told: Path) -> None:
    """Run a script in this (child) process; what it prints goes to a file."""
    sys.argv = [str(script), *arguments]
    with told.open("w") as file, contextlib.redirect_stdout(file):
        runpy.run_path(str(script), run_name="__main__")


def test_every_bench_is_among_them() -> None:
    assert {path.name for path in SCRIPTS.glob("bench_*.py")} == SMALL.keys() == RATIOS.keys()


@pytest.mark.parametrize("name", SMALL)
def test_its_last_line_is_one_json_object(name: str, tmp_path: Path) -> None:
    if name == "bench_decode.py":
        pytest.importorskip("decord")  # the plain loop that it is held against
    together(call, SCRIPTS / name, (*SMALL[name], "--json"), tmp_path / "told", ranks=1)
    lines = (tmp_path / "told").read_text().splitlines()
    found = json.loads(lines[-1])
    assert found.keys() >= {*RATIOS[name], "environment"}
    assert len(lines) > 1, "a person gets words before it"
    assert not any(line.startswith("{") for line in lines[:-1])
