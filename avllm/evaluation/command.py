"""`avllm eval` and `avllm retrieve`: a checkpoint and a manifest in, figures as JSON and as a table out."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from avllm.data.manifest import digest
from avllm.errors import UserError
from avllm.evaluation.benchmarks.base import Benchmark, benchmark_of
from avllm.evaluation.conditions import AS_IS, Condition
from avllm.evaluation.environment import environment
from avllm.evaluation.results import Result, table
from avllm.evaluation.retrieval import recall_table, retrieval
from avllm.evaluation.runner import Settings, evaluate_all
from avllm.inference.chat import check_device
from avllm.models.checkpoint_format import read_manifest_of
from avllm.models.modeling_avllm import AVLLM
from avllm.models.processing_avllm import AVProcessor
from avllm.precision import choose_precision

WIDE = 140
"""Columns of a table that goes into a file."""


def run_eval(
    checkpoint: str | Path,
    manifest: str | Path | None = None,
    *,
    benchmark: str | None = None,
    data: str | Path | None = None,
    options: Sequence[str] = (),
    without: Sequence[str] = (),
    swap: Sequence[str] = (),
    limit: int | None = None,
    refusal: str = "unanswerable",
    predictions: str | Path | None = None,
    device: str = "cpu",
    quantize: str | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Evaluate a checkpoint and print a table of each condition on stderr.

    Args:
        checkpoint: folder of a trained model.
        manifest: rows with their answers; or instead of it
        benchmark: a benchmark's name or ``pkg.module:Class``, with
        data: the folder that it reads, and
        options: its further options, ``key=value``.
        without, swap: streams to remove, and to exchange for another clip's: each is one more condition.
        limit: at most so many rows.
        refusal: the answer by which a question of a manifest is refused.
        predictions: file for one JSON object a row and condition.
        device, quantize: how the model is loaded.
        settings: see :class:`avllm.evaluation.runner.Settings`.

    Returns:
        ``{"checkpoint", "manifest" or "benchmark", "settings", "conditions": {name: figures}, "environment",
        "seconds"}``, JSON-able.
    """
    changed = [*(Condition(without=w) for w in without), *(Condition(swap=s) for s in swap)]  # type: ignore[arg-type]
    conditions = list(dict.fromkeys([AS_IS, *changed]))
    began, console = time.perf_counter(), _console()
    check_device(device)  # this and the next two lines: before a model is loaded
    Settings(**settings)
    rows = _chosen(manifest, benchmark, data, options, refusal)
    rows.samples()
    model = AVLLM.from_pretrained(str(checkpoint), device=device, quantize=quantize)
    processor = AVProcessor.from_pretrained(checkpoint)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("answering")

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        results = evaluate_all(model, processor, rows, conditions, limit=limit, progress=show, **settings)
    for result in results.values():
        console.print(table(result))
    if predictions is not None:
        write_predictions(predictions, results.values())
    given = {"refusal": refusal, "quantize": quantize, **settings}
    figures: dict[str, Any] = {"conditions": {name: result.to_dict() for name, result in results.items()}}
    if manifest is not None:
        figures |= {"manifest": _file(manifest, limit)}
    else:
        figures |= {"benchmark": {"name": benchmark, "data": str(data), "options": list(options), "limit": limit}}
    return _stamped(checkpoint, given, figures, device, began)


def _chosen(
    manifest: str | Path | None, benchmark: str | None, data: str | Path | None, options: Sequence[str], refusal: str
) -> Benchmark:
    """Build the benchmark that the arguments of :func:`run_eval` name.

    Raises:
        UserError: none or two are named, or options without a benchmark.
    """
    if (manifest is None) == (benchmark is None):
        raise UserError(
            f"the manifest is {manifest} and the benchmark {benchmark}; expected exactly one of the two: a JSONL file, "
            "or --benchmark NAME --data DIR"
        )
    if benchmark is None:
        if data is not None or options:
            raise UserError("--data and --option belong to --benchmark; a manifest is given alone")
        return benchmark_of("manifest", path=str(manifest), refusal=refusal)
    return benchmark_of(benchmark, data, options)


def run_retrieval(
    checkpoint: str | Path, manifest: str | Path, *, limit: int | None = None, device: str = "cpu", **settings: Any
) -> dict[str, Any]:
    """Search with a stage-1 run in both directions and print a table on stderr.

    Args:
        checkpoint: folder of a stage-1 run.
        manifest: captions, one a row.
        limit: at most so many captions.
        device: where to compute.
        settings: see :func:`avllm.evaluation.retrieval.retrieval`.

    Returns:
        as :func:`run_eval`, with ``retrieval`` in the place of ``conditions``.
    """
    began = time.perf_counter()
    check_device(device)
    found = retrieval(checkpoint, manifest, limit=limit, device=device, **settings)
    _console().print(recall_table(found))
    figures = {"manifest": _file(manifest, limit), "retrieval": found}
    return _stamped(checkpoint, settings, figures, device, began)


def _file(manifest: str | Path, limit: int | None) -> dict[str, Any]:
    return {"file": str(manifest), "sha256": digest(manifest), "limit": limit}


def _console() -> Console:
    console = Console(stderr=True)
    if not console.is_terminal:
        console.width = WIDE
    return console


def _stamped(
    checkpoint: str | Path,
    settings: dict[str, Any],
    figures: dict[str, Any],
    device: str,
    began: float,
) -> dict[str, Any]:
    """Figures with what they are of, and what they were measured with."""
    return {
        "checkpoint": {"folder": str(checkpoint), "manifest": read_manifest_of(checkpoint)},
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}
        | {"precision": choose_precision(settings.get("precision", "fp32"), torch.device(device).type)},
        **figures,
        "environment": environment(device),
        "seconds": round(time.perf_counter() - began, 3),
    }


def write_predictions(path: str | Path, results: Any) -> None:
    """One JSON object a row and condition: what was asked, said, true, and how it was scored."""
    every: list[Result] = list(results)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for result in every:
            for prediction in result.predictions:
                file.write(json.dumps(prediction.to_dict(result.condition.name), ensure_ascii=False) + "\n")
