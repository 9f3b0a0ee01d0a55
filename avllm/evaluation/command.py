"""`avllm eval`: a checkpoint and a manifest in, figures as JSON and as a table out."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from avllm.data.manifest import digest
from avllm.evaluation.conditions import AS_IS, Condition
from avllm.evaluation.environment import environment
from avllm.evaluation.results import Result, table
from avllm.evaluation.runner import evaluate_all
from avllm.inference.chat import check_device
from avllm.models.checkpoint import read_manifest_of
from avllm.models.modeling_avllm import AVLLM
from avllm.models.processing_avllm import AVProcessor

WIDE = 140
"""Columns of a table that goes into a file."""


def run_eval(
    checkpoint: str | Path,
    manifest: str | Path,
    *,
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
        manifest: rows with their answers.
        without, swap: streams to remove, and to exchange for another clip's: each is one more condition.
        limit: at most so many rows.
        refusal: the answer by which a question is refused.
        predictions: file for one JSON object a row and condition.
        device, quantize: how the model is loaded.
        settings: see :class:`avllm.evaluation.runner.Settings`.

    Returns:
        ``{"checkpoint", "manifest", "settings", "conditions": {name: figures}, "environment", "seconds"}``, JSON-able.
    """
    changed = [*(Condition(without=w) for w in without), *(Condition(swap=s) for s in swap)]  # type: ignore[arg-type]
    conditions = list(dict.fromkeys([AS_IS, *changed]))
    check_device(device)
    console = Console(stderr=True)
    if not console.is_terminal:
        console.width = WIDE
    began = time.perf_counter()
    model = AVLLM.from_pretrained(str(checkpoint), device=device, quantize=quantize)
    processor = AVProcessor.from_pretrained(checkpoint)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("answering")

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        results = evaluate_all(
            model, processor, manifest, conditions, limit=limit, refusal=refusal, progress=show, **settings
        )
    for result in results.values():
        console.print(table(result))
    if predictions is not None:
        write_predictions(predictions, results.values())
    return {
        "checkpoint": {"folder": str(checkpoint), "manifest": read_manifest_of(checkpoint)},
        "manifest": {"file": str(manifest), "sha256": digest(manifest), "limit": limit},
        "settings": {"refusal": refusal, "quantize": quantize}
        | {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()},
        "conditions": {name: result.to_dict() for name, result in results.items()},
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
