"""`avllm eval`, `avllm parts` and `avllm ckpt inspect` as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from avllm.cli import app


def call(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_eval_prints_json_and_writes_files(checkpoint: Path, questions: Path, tmp_path: Path) -> None:
    output, predictions = tmp_path / "figures.json", tmp_path / "answers.jsonl"
    files = ["--output", str(output), "--predictions", str(predictions)]
    short = ["--limit", "10", "--max-new-tokens", "3", "--batch-size", "4"]
    printed = call(
        "eval", str(checkpoint), str(questions), "--without", "audio", "--swap", "video", "--json", *files, *short
    )
    found = json.loads(printed.splitlines()[-1])
    assert found == json.loads(output.read_text())
    assert set(found["conditions"]) == {"as_is", "without_audio", "swapped_video"}
    assert found["conditions"]["as_is"]["all"]["n"] == 10
    assert {"quantize", "refusal", "seed", "max_new_tokens"} <= set(found["settings"])
    assert found["checkpoint"]["manifest"]["backbones"]["llm"]["sha256"]
    assert {"torch", "cpu", "time", "commit", "python"} <= set(found["environment"])
    rows = [json.loads(line) for line in predictions.read_text().splitlines()]
    assert len(rows) == 30
    assert {"id", "answer", "truth", "condition", "correct", "changed"} <= set(rows[0])


def test_parts_lists_the_registry() -> None:
    assert "qformer" in call("parts", "adapters")
    assert "num_queries" in call("parts", "adapters", "qformer")
    everything = json.loads(call("parts", "--json").splitlines()[-1])["parts"]
    assert {p["kind"] for p in everything} == {"encoders", "adapters", "layouts", "objectives", "benchmarks"}
    assert all(p["about"] for p in everything)
    with pytest.raises(ValueError, match="did you mean 'qformer'"):
        call("parts", "adapters", "qfomer")


def test_ckpt_inspect_tells_what_is_inside(checkpoint: Path) -> None:
    found = json.loads(call("ckpt", "inspect", str(checkpoint), "--json").splitlines()[-1])
    assert found["connector"] == ["mlp", "linear"]
    assert found["parameters"]["connector"] > 0
    assert all(record["found"] for record in found["backbones"].values())
