"""Run `avllm eval` and `avllm retrieve`: figures of a checkpoint, as JSON and as a table."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from avllm.data.manifest import digest
from avllm.data.schema import MediaPart, Sample, VideoPart
from avllm.data.store.output_path import output_file, output_folder
from avllm.errors import UserError
from avllm.evaluation.benchmarks.base import Benchmark, benchmark_of
from avllm.evaluation.conditions import AS_IS, Condition
from avllm.evaluation.environment import environment
from avllm.evaluation.report.page import About, write_report
from avllm.evaluation.report.pictures import Pictures
from avllm.evaluation.results import Result, table
from avllm.evaluation.retrieval import recall_table, retrieval
from avllm.evaluation.runner import evaluate_all
from avllm.evaluation.settings import Settings
from avllm.inference.chat import check_device
from avllm.log import logger
from avllm.models.checkpoint_format import read_manifest_of
from avllm.models.modeling_avllm import AVLLM
from avllm.models.processing_avllm import AVProcessor
from avllm.precision import choose_precision

LOG = logger(__name__)
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
    report: str | Path | None = None,
    tables: Console | None = None,
    device: str = "cpu",
    quantize: str | None = None,
    backbones: dict[str, str] | None = None,
    allow_parts: Collection[str] = (),
    strict: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Evaluate a checkpoint and print a table of each condition.

    Args:
        checkpoint: folder of a trained model.
        manifest: rows with their answers; or None, with a benchmark.
        benchmark: a benchmark's name or ``pkg.module:Class``; or None, with a manifest.
        data: the folder that the benchmark reads.
        options: further options of the benchmark, ``key=value``.
        without: streams to remove, each as one more condition.
        swap: streams to exchange for another clip's, each as one more condition.
        limit: at most so many rows.
        refusal: the answer by which a question of a manifest is refused.
        predictions: file for one JSON object a row and condition.
        report: HTML file for a page with all figures, confusions and wrong answers.
        tables: where the tables are printed; None takes stdout. Progress goes to stderr.
        device, quantize, backbones: how the model is loaded.
        allow_parts: parts from outside of the package that the checkpoint may name.
        strict: refuse rows with files that the model can use in part only; else they are counted
            under ``left_out``, by the medium that is not used.
        settings: see :class:`avllm.evaluation.settings.Settings`.

    Returns:
        ``{"checkpoint", "manifest" or "benchmark", "settings", "conditions": {name: figures},
        "left_out", "environment", "seconds"}``, JSON-able.

    Raises:
        UserError: a device, setting, file or stream that does not exist; with ``strict`` a row that
            the model can use in part only.
    """
    conditions = [AS_IS]
    conditions += [Condition(without=stream) for stream in without]  # type: ignore[arg-type]
    conditions += [Condition(swap=stream) for stream in swap]  # type: ignore[arg-type]
    conditions = list(dict.fromkeys(conditions))
    began = time.perf_counter()
    # Mistakes in the arguments are reported before a model is loaded, which takes long.
    check_device(device)
    _check_outputs(Settings(**settings).cache, predictions, report, manifest)
    rows = _chosen(manifest, benchmark, data, options, refusal)
    prompts = [rows.prompt(sample) for sample in rows.samples()]
    processor = AVProcessor.from_pretrained(checkpoint, allow_parts=allow_parts)
    left_out = rows_left_out(processor, prompts, strict)
    model = AVLLM.from_pretrained(
        str(checkpoint),
        device=device,
        quantize=quantize,
        backbones=backbones,
        allow_parts=allow_parts,
    )
    results = _evaluate_with_bar(model, processor, rows, conditions, limit, settings)
    console = tables or result_console()
    for result in results.values():
        console.print(table(result))
    if predictions is not None:
        write_predictions(predictions, results.values())
    by_condition = {name: result.to_dict() for name, result in results.items()}
    figures: dict[str, Any] = {"conditions": by_condition, "left_out": left_out}
    if manifest is not None:
        figures["manifest"] = _file(manifest, limit)
    else:
        asked = {"name": benchmark, "data": str(data), "options": list(options), "limit": limit}
        figures["benchmark"] = asked
    all_settings = {"refusal": refusal, "quantize": quantize, **settings}
    stamped = _stamped(checkpoint, all_settings, figures, device, began)
    if report is not None:
        _write_page(Path(report), results, stamped, Pictures(processor, rows.root), rows)
    return stamped


def _check_outputs(
    cache: str | Path | None,
    predictions: str | Path | None,
    report: str | Path | None,
    manifest: str | Path | None,
) -> None:
    """Check the paths that an evaluation writes to.

    Raises:
        OutputPathError: one of them cannot be written, or is the manifest or another one.
    """
    if cache is not None:
        output_folder(cache)
    if predictions is not None:
        output_file(predictions, [manifest, report])
    if report is not None:
        output_file(report, [manifest])


def rows_left_out(
    processor: AVProcessor, prompts: Sequence[Sample], strict: bool
) -> dict[str, int]:
    """Count the rows with videos of which the model uses the picture or the sound alone.

    Args:
        processor: the model's.
        prompts: the rows.
        strict: refuse such rows.

    Returns:
        rows by the medium that is not used, ``{"video": 12}``.

    Raises:
        UserError: ``no_encoder``: there are such rows, and ``strict``.
    """
    counts: dict[str, int] = {}
    for medium in ("video", "audio"):
        if processor.streams_of(medium):
            continue
        rows = sum(any(_means(part, medium) for part in prompt.media) for prompt in prompts)
        if not rows:
            continue
        counts[medium] = rows
        text = f"the model has no encoder for {medium}: in {rows} of {len(prompts)} rows the "
        text += f"{medium} of the videos, where there is one, is left out"
        if strict:
            advice = "leave out --strict to ask them all the same"
            raise UserError(f"{text}; {advice}", reason="no_encoder")
        LOG.warning("%s", text)
    return counts


def _means(part: MediaPart, medium: str) -> bool:
    """Return True if a part is a video of which the medium is meant."""
    return isinstance(part, VideoPart) and (medium == "video" or part.sound == "auto")


def _evaluate_with_bar(
    model: AVLLM,
    processor: AVProcessor,
    benchmark: Benchmark,
    conditions: Sequence[Condition],
    limit: int | None,
    settings: dict[str, Any],
) -> dict[str, Result]:
    """Ask all rows, with a bar on stderr."""
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("answering")

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        return evaluate_all(
            model, processor, benchmark, conditions, limit=limit, progress=show, **settings
        )


def _write_page(
    path: Path,
    results: dict[str, Result],
    stamped: dict[str, Any],
    pictures: Pictures,
    benchmark: Benchmark,
) -> None:
    """Write the page of an evaluation, with what it was measured on."""
    details = {key: value for key, value in stamped.items() if key != "conditions"}
    measured_on = stamped.get("manifest", {}).get("file") or stamped["benchmark"]["name"]
    about = About(stamped["checkpoint"]["folder"], measured_on, details)
    write_report(path, results, about, lambda row: pictures.of(benchmark.prompt(row)))


def _chosen(
    manifest: str | Path | None,
    benchmark: str | None,
    data: str | Path | None,
    options: Sequence[str],
    refusal: str,
) -> Benchmark:
    """Build the benchmark that the arguments of :func:`run_eval` name.

    Raises:
        UserError: none or two are named, or options without a benchmark.
    """
    if (manifest is None) == (benchmark is None):
        raise UserError(
            f"the manifest is {manifest} and the benchmark {benchmark}; "
            "expected exactly one of the two: a JSONL file, or --benchmark NAME --data DIR"
        )
    if benchmark is None:
        if data is not None or options:
            raise UserError(
                f"--data is {data} and --option {list(options)}; expected neither with a manifest: "
                "they belong to --benchmark"
            )
        return benchmark_of("manifest", path=str(manifest), refusal=refusal)
    return benchmark_of(benchmark, data, options)


def run_retrieval(
    checkpoint: str | Path,
    manifest: str | Path,
    *,
    limit: int | None = None,
    tables: Console | None = None,
    device: str = "cpu",
    backbones: dict[str, str] | None = None,
    allow_parts: Collection[str] = (),
    **settings: Any,
) -> dict[str, Any]:
    """Search with a stage-1 run in both directions and print a table.

    Args:
        checkpoint: folder of a stage-1 run.
        manifest: captions, one a row.
        limit: at most so many captions.
        tables: where the table is printed; None takes stdout.
        device: where to compute.
        backbones: other folders of backbones.
        allow_parts: parts from outside of the package that the checkpoint may name.
        settings: see :func:`avllm.evaluation.retrieval.retrieval`.

    Returns:
        as :func:`run_eval`, with ``retrieval`` in the place of ``conditions``.
    """
    began = time.perf_counter()
    check_device(device)
    recalls = retrieval(
        checkpoint,
        manifest,
        limit=limit,
        device=device,
        backbones=backbones,
        allow_parts=allow_parts,
        **settings,
    )
    (tables or result_console()).print(recall_table(recalls))
    figures = {"manifest": _file(manifest, limit), "retrieval": recalls}
    return _stamped(checkpoint, settings, figures, device, began)


def _file(manifest: str | Path, limit: int | None) -> dict[str, Any]:
    return {"file": str(manifest), "sha256": digest(manifest), "limit": limit}


def result_console(stderr: bool = False) -> Console:
    """Return where results are printed: stdout, or stderr where stdout is for one JSON object."""
    console = Console(stderr=stderr)
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
    """Add to figures the checkpoint, settings, environment and seconds of their measurement."""
    plain = {
        name: str(value) if isinstance(value, Path) else value for name, value in settings.items()
    }
    asked = settings.get("precision", "fp32")
    plain["precision"] = choose_precision(asked, torch.device(device).type)
    return {
        "checkpoint": {"folder": str(checkpoint), "manifest": read_manifest_of(checkpoint)},
        "settings": plain,
        **figures,
        "environment": environment(device),
        "seconds": round(time.perf_counter() - began, 3),
    }


def write_predictions(path: str | Path, results: Iterable[Result]) -> None:
    """Write one JSON object a row and condition: row, answer, truth and score."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for result in results:
            for prediction in result.predictions:
                record = prediction.to_dict(result.condition.name)
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
