"""Ask a model the rows of a benchmark, also with a stream removed or exchanged, and score it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from avllm.evaluation.asking import Run
from avllm.evaluation.benchmarks.base import Benchmark, benchmark_of
from avllm.evaluation.conditions import AS_IS, Condition
from avllm.evaluation.results import Result
from avllm.evaluation.settings import Settings
from avllm.precision import choose_precision


def evaluate(
    model: Any,
    processor: Any,
    rows: str | Path | Benchmark,
    *,
    without: str | None = None,
    swap: str | None = None,
    limit: int | None = None,
    refusal: str = "unanswerable",
    **settings: Any,
) -> Result:
    """Ask all rows under one condition.

    Args:
        model, processor: of one checkpoint.
        rows: a manifest, or a benchmark (:func:`~avllm.evaluation.benchmarks.base.benchmark_of`).
        without: ``audio``, ``video`` or ``both``: no token of that stream is left.
        swap: ``audio`` or ``video``: that stream comes from another clip.
        limit: at most so many rows, drawn by the seed, of each kind its share.
        refusal: the answer that refuses a question; a row's ``meta.refusal`` goes before it.
        settings: see :class:`~avllm.evaluation.settings.Settings`.

    Returns:
        the figures; under a changed condition also how often the answer changed (the rows are
        then asked without the change, too).
    """
    condition = Condition(without, swap)  # type: ignore[arg-type]
    conditions = [AS_IS] if condition == AS_IS else [AS_IS, condition]
    return evaluate_all(
        model,
        processor,
        rows,
        conditions,
        limit=limit,
        refusal=refusal,
        **settings,
    )[condition.name]


def evaluate_all(
    model: Any,
    processor: Any,
    rows: str | Path | Benchmark,
    conditions: Sequence[Condition] = (AS_IS,),
    *,
    limit: int | None = None,
    refusal: str = "unanswerable",
    progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> dict[str, Result]:
    """Ask all rows under several conditions.

    The figures are the same for every order of the rows. Each clip is decoded and encoded once;
    with more clips than ``clips_at_once`` and no cache, once more for each swap.

    Args:
        model, processor, rows, limit, refusal, settings: see :func:`evaluate`.
        conditions: with ``AS_IS`` among them, results also show how often answers change.
        progress: called with (rows answered, rows in all).

    Returns:
        results by the conditions' names.

    Raises:
        FailedRowsError: too many rows could not be asked. ManifestError: a malformed manifest.
        ValueError: a swap for which no clip has a partner.
    """
    chosen = Settings(**settings)
    benchmark = rows
    if not isinstance(benchmark, Benchmark):
        benchmark = benchmark_of("manifest", path=str(rows), refusal=refusal)
    was_training = model.training
    model.eval()
    try:
        precision = choose_precision(chosen.precision, model.device.type)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16"):
            return Run(
                model,
                processor,
                benchmark,
                list(conditions),
                chosen,
                progress,
                limit,
            ).results()
    finally:
        model.train(was_training)
