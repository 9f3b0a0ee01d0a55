"""`avllm eval`, `avllm parts` and `avllm ckpt inspect` as a user calls them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from avllm.cli.main import app
from avllm.data.schema import Sample
from avllm.evaluation.benchmarks.base import score_by_form
from avllm.evaluation.conditions import AS_IS
from avllm.evaluation.results import Prediction, Result, table
from avllm.registry import choices, kinds


def call(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_eval_prints_json_and_writes_files(
    checkpoint: Path, questions: Path, tmp_path: Path
) -> None:
    output, predictions = tmp_path / "figures.json", tmp_path / "answers.jsonl"
    files = ["--output", str(output), "--predictions", str(predictions)]
    short = ["--limit", "10", "--max-new-tokens", "3", "--batch-size", "4"]
    printed = call(
        "eval",
        str(checkpoint),
        str(questions),
        "--without",
        "audio",
        "--swap",
        "video",
        "--json",
        *files,
        *short,
    )
    found = json.loads(printed)  # the tables are on stderr
    assert found == json.loads(output.read_text())
    assert set(found["conditions"]) == {"as_is", "without_audio", "swapped_video"}
    assert found["conditions"]["as_is"]["all"]["n"] == 10
    assert {"quantize", "refusal", "seed", "max_new_tokens"} <= set(found["settings"])
    assert found["checkpoint"]["manifest"]["backbones"]["llm"]["sha256"]
    assert {"torch", "cpu", "time", "commit", "python"} <= set(found["environment"])
    rows = [json.loads(line) for line in predictions.read_text().splitlines()]
    assert len(rows) == 30
    assert {"id", "answer", "truth", "condition", "correct", "changed"} <= set(rows[0])


def test_tables_are_on_stdout(checkpoint: Path, questions: Path) -> None:
    done = CliRunner().invoke(
        app, ["eval", str(checkpoint), str(questions), "--limit", "2", "--max-new-tokens", "2"]
    )
    assert "as is" in done.stdout
    assert "as is" not in done.stderr


@pytest.mark.parametrize(
    "more, message",
    [
        (["absent.jsonl"], "absent.jsonl is not a file"),
        (["--precision", "fp8"], "fp8"),
        (["--without", "sound"], "expected 'audio', 'video' or 'both'"),
        (["--output", "/proc/nowhere/x.json"], "/proc/nowhere"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(
    questions: Path, more: list[str], message: str
) -> None:
    manifest = [] if more[0].endswith(".jsonl") else [str(questions)]
    done = CliRunner().invoke(app, ["eval", "/nowhere/checkpoint", *manifest, *more])
    assert message in str(done.exception) + done.stderr


def test_parts_lists_the_registry() -> None:
    assert "qformer" in call("parts", "adapters")
    assert "num_queries" in call("parts", "adapters", "qformer")
    everything = json.loads(call("parts", "--json"))["parts"]
    assert {p["kind"] for p in everything} == {kind for kind in kinds() if choices(kind)}
    assert all(p["about"] for p in everything)
    with pytest.raises(ValueError, match="did you mean 'qformer'"):
        call("parts", "adapters", "qfomer")


def test_ckpt_inspect_tells_what_is_inside(checkpoint: Path) -> None:
    found = json.loads(call("ckpt", "inspect", str(checkpoint), "--json"))
    assert found["connector"] == ["mlp", "linear"]
    assert found["parameters"]["connector"] > 0
    assert all(record["found"] for record in found["backbones"].values())


def test_tables_show_whole_figures_and_no_empty_column() -> None:
    said = {
        "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "red"}],
        "kind": "seen.colour",
    }
    rows = [
        Sample.model_validate({"id": str(i), "choices": ["red", "blue"], **said}) for i in range(3)
    ]
    predictions = [
        Prediction(s, "red", score_by_form(s, "red", 1.0, "x"), touched=False) for s in rows
    ]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table(Result(AS_IS, predictions)))
    shown = console.export_text()
    assert "43.9-100.0" in shown  # Wilson, 3 of 3
    assert "seen.colour" in shown
    assert "error" not in shown
    assert "…" not in shown
