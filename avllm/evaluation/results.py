"""Turn scored answers into figures by kind and source, as JSON and as a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from avllm.data.schema import Sample
from avllm.evaluation.benchmarks.base import Prediction
from avllm.evaluation.conditions import Condition
from avllm.evaluation.scoring.metrics import (
    bootstrap_mean,
    constant_accuracy,
    constant_error,
    wilson,
)

Figures = Callable[[Sequence[Prediction]], dict[str, float]]
"""Figures over a set of answers: ``Benchmark.figures``."""


@dataclass(frozen=True)
class Result:
    """Hold the predictions of one condition, and compute its figures.

    Attributes:
        failed: rows that could not be asked, ``{"id", "reason", "detail"}``; they count as wrong.
        corpus: gives figures over all rows, and over those of a kind or source.
    """

    condition: Condition
    predictions: list[Prediction]
    seed: int = 0
    failed: list[dict[str, str]] = field(default_factory=list)
    corpus: Figures | None = None

    @property
    def overall(self) -> dict[str, Any]:
        """Figures over all rows."""
        return figures(self.predictions, self.seed, self.corpus)

    @property
    def kinds(self) -> dict[str, dict[str, Any]]:
        """Return figures by kind of question; rows without a kind count as ``none``."""
        return self._by(lambda sample: sample.kind or "none")

    @property
    def sources(self) -> dict[str, dict[str, Any]]:
        """Return figures by source."""
        return self._by(lambda sample: sample.source)

    def _by(self, key: Callable[[Sample], str]) -> dict[str, dict[str, Any]]:
        groups: dict[str, list[Prediction]] = {}
        for prediction in self.predictions:
            groups.setdefault(key(prediction.sample), []).append(prediction)
        return {name: figures(groups[name], self.seed, self.corpus) for name in sorted(groups)}

    def to_dict(self) -> dict[str, Any]:
        """Return all figures, JSON-able."""
        groups = {"all": self.overall, "kinds": self.kinds, "sources": self.sources}
        return {**groups, "failed": self.failed}


def figures(
    predictions: Sequence[Prediction], seed: int = 0, corpus: Figures | None = None
) -> dict[str, Any]:
    """Compute the figures of a group of rows, which do not depend on the rows' order.

    Returns:
        For all rows ``n``, and the shares ``failed`` (not asked, counted as wrong), ``refused``,
        ``touched`` and ``changed`` (where answers were compared).

        For rows that are right or wrong ``accuracy`` with its 95% interval ``low`` to ``high``
        (Wilson); ``chance``, the better of ``chance_constant`` (the one answer that is right most
        often) and ``chance_uniform`` (1 / choices; rows without choices are never guessed right);
        ``f1`` over rows without choices.

        For rows whose answer is a time ``mae_s`` with the interval ``mae_low`` to ``mae_high``
        (bootstrap), ``mae_chance`` (the best constant answer), and ``no_number``, the share of
        answers that were no number: the error of such an answer is the length of its clip.

        Where the benchmark has them, ``values``: ``{name: {n, mean, low, high}}`` of the rows'
        further figures (bootstrap), and ``corpus``: ``{name: figure}`` over these rows together.
    """
    # Sums and resamples depend on order in their last digits: both go by the rows' ids.
    predictions = sorted(predictions, key=lambda prediction: prediction.sample.id)
    computed: dict[str, Any] = {
        "n": len(predictions),
        "failed": _mean([p.failed for p in predictions]),
        "refused": _mean([p.score.refused for p in predictions]),
        "touched": _mean([p.touched for p in predictions]),
    }
    compared = [p.changed for p in predictions if p.changed is not None]
    if compared:
        computed["changed"] = _mean(compared)
    judged = [p for p in predictions if p.score.correct is not None]
    if judged:
        computed |= _accuracy(judged)
    timed = [p for p in predictions if p.score.error is not None]
    if timed:
        computed |= _errors(timed, seed)
    values = _values(predictions, seed)
    if values:
        computed["values"] = values
    over_all = corpus(predictions) if corpus and predictions else {}
    if over_all:
        computed["corpus"] = over_all
    return computed


def _values(rows: Sequence[Prediction], seed: int) -> dict[str, dict[str, float]]:
    """Average each further figure over the rows that have it."""
    by_name: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.score.values.items():
            by_name.setdefault(name, []).append(float(value))
    averaged = {}
    for name, values in sorted(by_name.items()):
        interval = bootstrap_mean(values, seed)
        averaged[name] = {
            "n": len(values),
            "mean": _mean(values),
            "low": interval.low,
            "high": interval.high,
        }
    return averaged


def _accuracy(rows: Sequence[Prediction]) -> dict[str, Any]:
    hits = sum(bool(p.score.correct) for p in rows)
    interval = wilson(hits, len(rows))
    constant = constant_accuracy([p.sample.answer or "" for p in rows])
    computed: dict[str, Any] = {
        "n_judged": len(rows),
        "accuracy": hits / len(rows),
        "low": interval.low,
        "high": interval.high,
        "chance": constant,
        "chance_constant": constant,
    }
    uniform = [1 / len(p.sample.choices) for p in rows if p.sample.choices]
    if uniform:
        computed["chance_uniform"] = sum(uniform) / len(rows)
        computed["chance"] = max(constant, computed["chance_uniform"])
    f1s = [p.score.f1 for p in rows if p.score.f1 is not None]
    if f1s:
        computed["f1"] = _mean(f1s)
    return computed


def _errors(rows: Sequence[Prediction], seed: int) -> dict[str, Any]:
    errors = [float(p.score.error or 0.0) for p in rows]
    interval = bootstrap_mean(errors, seed)
    return {
        "n_timed": len(rows),
        "mae_s": _mean(errors),
        "mae_low": interval.low,
        "mae_high": interval.high,
        "mae_chance": constant_error([p.sample.seconds or 0.0 for p in rows]),
        "no_number": _mean([not p.score.is_number for p in rows]),
    }


def _mean(values: Sequence[float | bool]) -> float:
    return float(sum(values) / len(values)) if values else 0.0


ABOUT = "chance: the better of always one answer and guessing among the choices, on these rows"
# Columns of one heading differ in the number of spaces after it.
COLUMNS = (
    "",
    "n",
    "accuracy",
    "95%",
    "chance",
    "F1",
    "error",
    "95% ",
    "chance ",
    "refused",
    "changed",
    "failed",
)


def table(result: Result) -> Table:
    """Return the figures of a condition for the terminal, by kind, by source, and over all rows.

    Columns without figures are left out.
    """
    overall = result.overall
    values = list(overall.get("values", {}))
    corpus = list(overall.get("corpus", {}))
    columns = [*COLUMNS]
    for name in values:
        columns += [name, "95%  "]
    columns += corpus

    def line(name: str, row: dict[str, Any]) -> list[str]:
        return [name, *_cells(row), *_further(row, values, corpus)]

    kinds = [line(name, row) for name, row in result.kinds.items()]
    sources = [line(f"source {name}", row) for name, row in result.sources.items()]
    total = line("all", overall)
    lines = [*kinds, *sources, total]
    is_filled = [any(cells) for cells in zip(*lines, strict=True)]  # by column
    filled = [place for place, is_shown in enumerate(is_filled) if is_shown]
    made = Table(
        title=result.condition.name.replace("_", " "),
        title_justify="left",
        header_style="bold",
        box=SIMPLE_HEAD,
        caption=ABOUT if COLUMNS.index("chance") in filled else None,
        caption_justify="left",
    )
    for place in filled:
        # A figure too wide for the terminal is folded: cut off, it would read as another figure.
        made.add_column(columns[place], justify="right" if place else "left", overflow="fold")
    for section in (kinds, sources, [total]):
        for cells in section:
            shown = [cells[place] for place in filled]
            made.add_row(*shown, style="bold" if cells is total else None)
        made.add_section()
    return made


def _further(row: dict[str, Any], values: Sequence[str], corpus: Sequence[str]) -> list[str]:
    """Return cells of the benchmark's figures: means with intervals, then figures over a corpus."""
    cells = []
    for name in values:
        value = row.get("values", {}).get(name)
        if value is None:
            cells += ["", ""]
        else:
            cells += [f"{value['mean']:.3f}", f"{value['low']:.3f}-{value['high']:.3f}"]
    for name in corpus:
        figure = row.get("corpus", {}).get(name)
        cells.append("" if figure is None else f"{figure:.3f}")
    return cells


def _cells(row: dict[str, Any]) -> list[str]:
    """Return the cells of ``COLUMNS`` after the first; empty where the rows have no such figure."""

    def share(key: str) -> str:
        return f"{100 * row[key]:.1f}" if key in row else ""

    def seconds(key: str) -> str:
        return f"{row[key]:.3f} s" if key in row else ""

    interval = f"{share('low')}-{share('high')}" if "low" in row else ""
    accuracy = [share("accuracy"), interval, share("chance"), share("f1")]
    interval = f"{row['mae_low']:.3f}-{row['mae_high']:.3f}" if "mae_low" in row else ""
    error = [seconds("mae_s"), interval, seconds("mae_chance")]
    failed = share("failed") if row["failed"] else ""
    return [str(row["n"]), *accuracy, *error, share("refused"), share("changed"), failed]
