"""Stderr holds our own lines: libraries' notices are kept off, their errors stay."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from answering import make_checkpoint
from tiny import COLOURS, write_clip

ROOT = Path(__file__).resolve().parents[1]
NOISE = """
import logging, warnings
from avllm.log import hush_libraries, logger
hush_libraries()
logging.getLogger("bitsandbytes.backends.cpu.ops").warning("notice 1")
logging.getLogger("some_library").warning("notice 2")
from transformers.utils import logging as of_transformers
of_transformers.get_logger("transformers.generation").warning("notice 3")
warnings.warn_explicit("notice 4", FutureWarning, "x.py", 1, module="transformers.models")
warnings.warn_explicit("notice 5", UserWarning, "x.py", 1, module="torch.nn")
for _ in of_transformers.tqdm(range(2), desc="notice 6"): pass
warnings.warn_explicit("stays 1", UserWarning, "x.py", 1, module="my_parts")
logging.getLogger("some_library").error("stays 2")
logger("data").warning("stays 3")
"""


def stderr_of(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stderr


def test_notices_of_libraries_are_kept_off_and_errors_stay() -> None:
    said = stderr_of("-c", NOISE)
    assert "notice" not in said
    assert [f"stays {number}" in said for number in (1, 2, 3)] == [True] * 3


def test_asking_says_nothing_beside_the_answer(tmp_path: Path) -> None:
    """In a new process, which takes seconds: some libraries say things while they are imported."""
    pytest.importorskip("bitsandbytes")
    checkpoint = make_checkpoint(tmp_path)
    clip = write_clip(tmp_path / "a.mp4", COLOURS["red"], 300.0)
    question = ["--video", str(clip), "what colour is it ?", "--max-new-tokens", "4"]
    command = ["-m", "avllm", "ask", str(checkpoint), *question, "--quantize", "4bit"]
    assert stderr_of(*command) == ""
