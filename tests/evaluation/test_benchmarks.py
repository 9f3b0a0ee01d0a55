"""Benchmarks by name: their authors' layouts, further figures, corpus figures, the command."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny import COLOURS, row, text, write_clip, write_rows
from typer.testing import CliRunner

from avllm.cli.main import app
from avllm.data.schema import Sample
from avllm.errors import UserError
from avllm.evaluation.benchmarks.base import Prediction, Score, benchmark_of
from avllm.evaluation.conditions import AS_IS
from avllm.evaluation.results import Result, table
from avllm.evaluation.runner import evaluate
from avllm.evaluation.scoring.metrics import corpus_bleu, edit_distance


@pytest.fixture(scope="module")
def daily_omni(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos, one in each of the places, three questions."""
    folder = tmp_path_factory.mktemp("daily_omni")
    for video, place in (("aB-1", "Videos/aB-1"), ("cD_2", "cD_2")):
        (folder / place).mkdir(parents=True)
        write_clip(folder / place / f"{video}_video.mp4", COLOURS["red"], 300.0)
    choices = ["A. red", "B. green", "C. blue", "D. white"]
    about = {"Choice": choices, "video_category": "Food", "video_parent_category": "x"}
    records = [
        {
            "Question": "what colour is it ?",
            "Answer": "A",
            "video_id": "aB-1",
            "Type": "AV Event Alignment",
        },
        {"Question": "what is there ?", "Answer": "C", "video_id": "aB-1", "Type": "Reasoning"},
        {"Question": "what colour ?", "Answer": "D", "video_id": "cD_2", "Type": "Reasoning"},
    ]
    written = [record | about | {"video_duration": "30s"} for record in records]
    (folder / "qa.json").write_text(json.dumps(written))
    return folder


def test_daily_omni_reads_its_authors_layout(daily_omni: Path) -> None:
    benchmark = benchmark_of("daily_omni", daily_omni)
    first, _, last = benchmark.samples()
    assert (first.answer, first.kind, first.source) == ("red", "AV Event Alignment", "30s")
    assert first.choices == ["red", "green", "blue", "white"]
    assert (benchmark.root / last.media[0].video).is_file()
    assert [
        benchmark.score(first, said, 1.0).correct for said in ("A", "(a)", "red", "B", "?")
    ] == [
        True,
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(
    "change",
    [{"Answer": "E"}, {"Choice": ["red", "green"]}, {"Type": None}],
    ids=["letter", "choices", "field"],
)
def test_a_malformed_question_is_named(
    daily_omni: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    record = json.loads((daily_omni / "qa.json").read_text())[0] | change
    written = {key: value for key, value in record.items() if value is not None}
    (tmp_path / "qa.json").write_text(json.dumps([written]))
    with pytest.raises(UserError, match="question 0"):
        benchmark_of("daily_omni", tmp_path).samples()


def test_the_command_asks_a_benchmark_by_name(checkpoint: Path, daily_omni: Path) -> None:
    done = CliRunner().invoke(
        app,
        ["eval", str(checkpoint), "--benchmark", "daily_omni", "--data", str(daily_omni),
         "--max-new-tokens", "2",
         "--without", "audio", "--limit", "2", "--json"],
        catch_exceptions=False,
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["benchmark"] == {
        "name": "daily_omni",
        "data": str(daily_omni),
        "options": [],
        "limit": 2,
    }
    assert found["conditions"]["as_is"]["all"]["n"] == 2
    assert found["conditions"]["as_is"]["all"]["chance_uniform"] == 0.25
    assert set(found["conditions"]) == {"as_is", "without_audio"}


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["rows.jsonl", "--benchmark", "captions"],
        ["rows.jsonl", "--data", "."],
        ["--benchmark", "daily_omny"],
    ],
    ids=["neither", "both", "data alone", "unknown"],
)
def test_one_of_manifest_and_benchmark(arguments: list[str]) -> None:
    done = CliRunner().invoke(app, ["eval", "/nowhere/checkpoint", *arguments])
    assert isinstance(done.exception, UserError)


def test_corpus_figures_of_captions(
    loaded: tuple[Any, Any], questions: Path, tmp_path: Path
) -> None:
    part = {"type": "video", "video": str(questions.parent / "000.mp4")}
    manifest = write_rows(
        tmp_path / "c.jsonl", [row("1", [part, text("describe the clip")], "red and a low sound")]
    )
    result = evaluate(*loaded, benchmark_of("captions", manifest), max_new_tokens=3)
    figures = result.to_dict()["all"]
    assert figures["values"]["token_f1"]["n"] == 1
    assert set(figures["corpus"]) == {"bleu4"}


def predictions(*pairs: tuple[str, str]) -> list[Prediction]:
    found = []
    for number, (said, truth) in enumerate(pairs):
        sample = Sample.model_validate(row(str(number), [text("?")], truth))
        found.append(Prediction(sample, said, Score(values={"length": float(len(said.split()))})))
    return found


def test_word_error_rate_is_over_the_corpus(tmp_path: Path) -> None:
    benchmark = benchmark_of(
        "transcripts", write_rows(tmp_path / "t.jsonl", [row("1", [text("?")], "red")])
    )
    said = predictions(("red green blue", "red blue"), ("white", "white red green blue white red"))
    assert benchmark.figures(said) == {"wer": (1 + 5) / (2 + 6)}
    assert benchmark.score(said[0].sample, "Red, green!", 1.0).values == {"word_errors": 1.0}


def test_edit_distance_and_bleu_by_hand() -> None:
    assert edit_distance(["a", "b", "c", "d"], ["b", "x", "d"]) == 2
    assert edit_distance([], ["a", "b"]) == edit_distance(["a", "b"], []) == 2
    same = ["red dog runs very fast", "blue cat"]
    assert corpus_bleu(same[:1], [same[:1]]) == pytest.approx(1.0)
    # 3 of 4 words, 2 of 3 pairs are there; the reference is as long as the answer
    assert corpus_bleu(["w x y q"], [["w x y z"]], longest=2) == pytest.approx(
        (3 / 4 * 2 / 3) ** 0.5
    )
    assert corpus_bleu(["w x"], [["w x y z"]], longest=2) == pytest.approx(
        2.718281828 ** (1 - 4 / 2)
    )
    assert corpus_bleu(["w x"], [["y z"]]) == 0.0


def test_values_have_means_and_intervals_and_columns() -> None:
    rows = predictions(("one two", "x"), ("one two three four", "x"), ("one two three", "x"))
    result = Result(AS_IS, rows, corpus=lambda given: {"answers": float(len(given))})
    figures = result.overall
    assert figures["values"]["length"]["mean"] == 3.0
    assert figures["values"]["length"]["low"] < 3.0 < figures["values"]["length"]["high"]
    assert figures["corpus"] == {"answers": 3.0}
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table(result))
    shown = console.export_text()
    assert "length" in shown
    assert "answers" in shown
    assert "accuracy" not in shown
