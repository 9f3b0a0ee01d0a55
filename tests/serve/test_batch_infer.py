"""The batch script in processes of its own: killed, started again, and a wrong call."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
from tiny import row, text, write_rows

ROOT = Path(__file__).resolve().parents[2]
ROWS = 200


def command(checkpoint: Path, requests: Path, output: Path) -> list[str]:
    files = ["--input", str(requests), "--output", str(output)]
    return [
        sys.executable,
        "serve/batch_infer.py",
        str(checkpoint),
        *files,
        "--batch-size",
        "2",
        "--max-new-tokens",
        "40",
    ]


def test_killed_and_started_again(checkpoint: Path, clips: list[Path], tmp_path: Path) -> None:
    rows = []
    for i in range(ROWS):
        media = {
            "type": "video",
            "video": str(clips[i % 3]) if i % 7 else "no.mp4",
            "end": 0.3 + i / ROWS,
        }
        rows.append(row(f"r{i}", [media, text("what colour is it ?")], "red"))
    requests, output = write_rows(tmp_path / "requests.jsonl", rows), tmp_path / "answers.jsonl"
    first = subprocess.Popen(
        command(checkpoint, requests, output), cwd=ROOT, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 900  # a busy machine imports slowly
        while lines(output) < 24 and time.monotonic() < deadline and first.poll() is None:
            time.sleep(0.02)
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    before = output.read_bytes()
    assert 24 <= lines(output) < ROWS
    done = subprocess.run(
        command(checkpoint, requests, output), cwd=ROOT, capture_output=True, text=True, check=True
    )
    kept = before.count(b"\n")
    assert f"{kept} rows were there" in done.stdout
    found = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [r["id"] for r in found] == [f"r{i}" for i in range(ROWS)]
    assert [i for i, r in enumerate(found) if "error" in r] == list(range(0, ROWS, 7))
    assert output.read_bytes().startswith(before[: before.rfind(b"\n") + 1])


def lines(path: Path) -> int:
    """Whole lines of a file that may not be there yet."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_wrong_call_is_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        command(tmp_path, tmp_path / "no.jsonl", tmp_path / "a.jsonl"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "error: " in done.stderr
    assert "no.jsonl" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("strict", [True, False])
def test_failed_rows_are_counted_and_with_strict_fail(
    strict: bool,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    missing = {"type": "video", "video": "no.mp4"}
    rows = [row("a", [text("what ?")], "x"), row("b", [missing, text("what ?")], "x")]
    requests = write_rows(tmp_path / "requests.jsonl", rows)
    spec = importlib.util.spec_from_file_location("batch_infer", ROOT / "serve/batch_infer.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    arguments = command(checkpoint, requests, tmp_path / "answers.jsonl")[1:]
    arguments += ["--strict"] if strict else []
    for _ in range(2):  # also where nothing is left to answer
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) if strict else nullcontext() as end:
            script.main()
        assert not strict or end.value.code == 1
        assert "1 of 2 rows failed" in capsys.readouterr().err
