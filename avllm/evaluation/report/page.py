"""Write an evaluation as one self-contained page, every condition side by side.

Answers, ids and names of files come from strangers: every text goes through :func:`text`.
"""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avllm.data.check.page import card, cut, document
from avllm.data.schema import Sample
from avllm.evaluation.benchmarks.base import Prediction
from avllm.evaluation.conditions import AS_IS
from avllm.evaluation.report.confusion import NOT_ASKED, Confusion, confusion
from avllm.evaluation.results import Result
from avllm.evaluation.sampling import draw_rows
from avllm.evaluation.scoring.metrics import wilson

WRONG = 24  # rows with pictures
ROWS = 500  # of the table of answers
FAILED = 50
LONGEST = 200  # characters of a text
STYLE = """
body { max-width: 1400px } small { color: var(--soft) }
.right { color: #2a7d3f } .wrong { color: var(--error) }
.figures { font-size: 90% } .figures .value { white-space: nowrap }
.figures td, .figures th { overflow-wrap: normal } .figures tr:last-child { font-weight: 600 }
.scroll { overflow-x: auto } .side { display: flex; flex-wrap: wrap; gap: 1em 2.5em }
.confusion { width: auto } .confusion td, .confusion th { padding: .2em .6em; text-align: right;
  max-width: 9em; overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
.confusion th:first-child { text-align: left } .confusion td { border: 1px solid var(--line) }
.rows { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 1em }
.row { border: 1px solid var(--line); border-radius: 8px; padding: .7em 1em;
  overflow-wrap: anywhere }
.row img { max-width: 100%; display: block; margin: 0 0 .4em; border-radius: 4px }
.row table { margin: .3em 0 0 } .row td { padding: .15em .6em .15em 0 }
.answers { font-size: 90% } pre { white-space: pre-wrap; overflow-wrap: anywhere }
"""

Draw = Callable[[Sample], Sequence[str]]
"""Returns pictures of a row's media, PNG in base64."""


@dataclass(frozen=True)
class About:
    """Say what was measured.

    Attributes:
        checkpoint: its folder.
        rows: the manifest or benchmark.
        details: settings and environment, shown as JSON.
    """

    checkpoint: str
    rows: str
    details: Mapping[str, Any]


def write_report(path: Path, results: Mapping[str, Result], about: About, draw: Draw) -> None:
    """Write the page.

    Args:
        path: of the HTML file.
        results: by condition, with the same rows in each; the first is shown first.
        about: what was measured.
        draw: gives the pictures of a row.
    """
    first = next(iter(results.values()))
    body = "\n".join(
        [
            "<h1>Evaluation</h1>",
            f"<p>{text(about.checkpoint)} on {text(about.rows)}</p>",
            _cards(first),
            "<h2>Figures</h2>",
            _figures(results),
            "<h2>Confusions</h2>",
            _confusions(results),
            "<h2>By true answer</h2>",
            _by_truth(results),
            "<h2>Wrong answers</h2>",
            _wrong(results, draw),
            "<h2>Answers</h2>",
            _answers(results),
            _failures(results),
            "<h2>Settings</h2>",
            f"<details><summary>settings and environment</summary>{_details(about)}</details>",
        ]
    )
    page = document("Evaluation", body, STYLE)
    path.write_text(page, encoding="utf-8", errors="replace")


def text(value: object, longest: int = LONGEST) -> str:
    """Return a stranger's text for the page: escaped, cut, without control characters.

    ``bdi`` keeps right-to-left text from reordering what follows it.
    """
    shown = []
    for character in str(value):
        is_control = unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t"
        shown.append("\ufffd" if is_control else character)
    return f"<bdi>{cut(''.join(shown), longest)}</bdi>"


def _named(condition: str) -> str:
    return text("unchanged" if condition == AS_IS.name else condition.replace("_", " "))


# ---- figures ------------------------------------------------------------------------------------


def _cards(result: Result) -> str:
    overall = result.overall
    cards = [card(f"{overall['n']:,}", "rows")]
    if "accuracy" in overall:
        ends = f"{100 * overall['low']:.1f} to {100 * overall['high']:.1f}"
        cards.append(card(f"{100 * overall['accuracy']:.1f}%", f"right (95%: {ends})"))
    if "mae_s" in overall:
        ends = f"{overall['mae_low']:.2f} to {overall['mae_high']:.2f}"
        cards.append(card(f"{overall['mae_s']:.2f} s", f"mean error (95%: {ends})"))
    failed = len(result.failed)
    cards.append(card(f"{failed:,}", "rows not asked, counted as wrong", failed, "error"))
    return f"<div class=cards>{''.join(cards)}</div>"


def _figures(results: Mapping[str, Result]) -> str:
    """Return a table: a line for each kind and source, a column for each condition."""
    first = next(iter(results.values()))
    groups: list[tuple[str, list[dict[str, Any]]]] = []
    kinds = [result.kinds for result in results.values()]
    groups += [(kind, [by_kind[kind] for by_kind in kinds]) for kind in first.kinds]
    sources = [result.sources for result in results.values()]
    if len(first.sources) > 1:
        for source in first.sources:
            groups.append((f"source {source}", [by_source[source] for by_source in sources]))
    groups.append(("all", [result.overall for result in results.values()]))
    head = "".join(f"<th>{_named(name)}</th>" for name in results)
    lines = []
    for name, rows in groups:
        cells = "".join(f"<td>{_figure(row)}</td>" for row in rows)
        line = f"<td>{text(name)}</td><td class=n>{rows[0]['n']:,}</td><td>{_chance(rows[0])}</td>"
        lines.append(f"<tr>{line}{cells}</tr>")
    head = f"<tr><th></th><th class=n>n</th><th>chance</th>{head}</tr>"
    return f"<div class=scroll><table class=figures>{head}{''.join(lines)}</table></div>"


def _figure(row: Mapping[str, Any]) -> str:
    """Return all figures of a group of rows, with their intervals."""
    lines: list[str] = []
    if "accuracy" in row:
        ends = f"{100 * row['low']:.1f} to {100 * row['high']:.1f}"
        lines.append(_value(f"{100 * row['accuracy']:.1f}%", ends))
    if "mae_s" in row:
        ends = f"{row['mae_low']:.2f} to {row['mae_high']:.2f}"
        lines.append(_value(f"{row['mae_s']:.2f} s", ends))
    for name, value in row.get("values", {}).items():
        ends = f"{value['low']:.3f} to {value['high']:.3f}"
        lines.append(_value(f"{text(name)} {value['mean']:.3f}", ends))
    for name, value in row.get("corpus", {}).items():
        lines.append(_value(f"{text(name)} {value:.3f}", ""))
    names = [name for name in ("changed", "refused", "failed", "no_number") if row.get(name)]
    shares = [f"{100 * row[name]:.1f}% {name.replace('_', ' ')}" for name in names]
    if "f1" in row:
        shares.append(f"F1 {100 * row['f1']:.1f}")
    if shares:
        lines.append(f"<small>{', '.join(shares)}</small>")
    return "<br>".join(lines)


def _value(figure: str, interval: str) -> str:
    return f"<span class=value>{figure} <small>{interval}</small></span>"


def _chance(row: Mapping[str, Any]) -> str:
    lines = []
    if "chance" in row:
        lines.append(f"{100 * row['chance']:.1f}%")
    if "mae_chance" in row:
        lines.append(f"{row['mae_chance']:.2f} s")
    return "<br>".join(lines)


# ---- confusions ---------------------------------------------------------------------------------


def _by_kind(result: Result) -> dict[str, list[Prediction]]:
    groups: dict[str, list[Prediction]] = {}
    for prediction in result.predictions:
        groups.setdefault(prediction.sample.kind or "none", []).append(prediction)
    return dict(sorted(groups.items()))


def _confusions(results: Mapping[str, Result]) -> str:
    """Return the matrices of each kind, those of all conditions side by side."""
    groups = {name: _by_kind(result) for name, result in results.items()}
    kinds = next(iter(groups.values()))
    sections = []
    for kind in kinds:
        matrices = []
        for name, by_kind in groups.items():
            matrix = confusion(by_kind[kind])
            if matrix is not None:
                caption = f"<figcaption>{_named(name)}</figcaption>"
                matrices.append(f"<figure>{caption}{_matrix(matrix)}</figure>")
        if matrices:
            side = f"<div class=side>{''.join(matrices)}</div>"
            sections.append(f"<details open><summary>{text(kind)}</summary>{side}</details>")
    if not sections:
        return "<p>No kind of question has a small set of answers.</p>"
    return "<p>Rows are true answers, columns given ones.</p>" + "".join(sections)


def _matrix(matrix: Confusion) -> str:
    names = "".join(f"<th>{text(answer, 20)}</th>" for answer in matrix.answers)
    lines = [f"<tr><th></th>{names}</tr>"]
    for truth in matrix.truths:
        total = matrix.of_truth(truth)
        cells = ""
        for answer in matrix.answers:
            count = matrix.counts.get((truth, answer), 0)
            colour = "42, 125, 63" if answer == truth else "208, 50, 44"
            style = f"background: rgba({colour}, {0.65 * count / max(1, total):.2f})"
            cells += f'<td style="{style}">{count or ""}</td>'
        lines.append(f"<tr><th>{text(truth, 30)}</th>{cells}</tr>")
    return f"<div class=scroll><table class=confusion>{''.join(lines)}</table></div>"


def _by_truth(results: Mapping[str, Result]) -> str:
    """Return a table for each kind: how often each true answer is given, by condition."""
    groups = {name: _by_kind(result) for name, result in results.items()}
    sections = []
    for kind, predictions in next(iter(groups.values())).items():
        matrix = confusion(predictions)
        if matrix is None:
            continue
        head = "".join(f"<th>{_named(name)}</th>" for name in results)
        lines = [f"<tr><th>true answer</th><th class=n>n</th>{head}</tr>"]
        matrices = [confusion(by_kind[kind]) for by_kind in groups.values()]
        for truth in matrix.truths:
            cells = "".join(f"<td>{_recall(other, truth)}</td>" for other in matrices)
            n = matrix.of_truth(truth)
            lines.append(f"<tr><td>{text(truth)}</td><td class=n>{n}</td>{cells}</tr>")
        table = f"<table class=figures>{''.join(lines)}</table>"
        summary = f"<summary>{text(kind)}</summary>"
        sections.append(f"<details>{summary}<div class=scroll>{table}</div></details>")
    return "".join(sections) or "<p>No kind of question has a small set of answers.</p>"


def _recall(matrix: Confusion | None, truth: str) -> str:
    if matrix is None:
        return ""
    hits = matrix.counts.get((truth, truth), 0)
    total = matrix.of_truth(truth)
    interval = wilson(hits, total)
    ends = f"{100 * interval.low:.1f} to {100 * interval.high:.1f}"
    return _value(f"{100 * hits / total:.1f}%", ends)


# ---- rows ---------------------------------------------------------------------------------------


def _rows(results: Mapping[str, Result]) -> list[list[Prediction]]:
    """Return the predictions of each row, one a condition."""
    columns = [result.predictions for result in results.values()]
    return [list(predictions) for predictions in zip(*columns, strict=True)]


def is_wrong(prediction: Prediction, chance: Mapping[str, float]) -> bool:
    """Return whether an answer is wrong; of times: further off than the best constant answer.

    Args:
        prediction: the answer.
        chance: the mean error of the best constant answer, by kind.
    """
    if prediction.score.error is not None:
        limit = chance.get(prediction.sample.kind or "none", 0.0)
        return not prediction.score.is_number or prediction.score.error > limit
    return prediction.score.correct is False


def _wrong(results: Mapping[str, Result], draw: Draw) -> str:
    """Return some wrong answers with pictures, of each kind its share."""
    first = next(iter(results.values()))
    chance = {name: row.get("mae_chance", 0.0) for name, row in first.kinds.items()}
    by_id: dict[str, list[Prediction]] = {}
    for predictions in _rows(results):
        if is_wrong(predictions[0], chance) and not predictions[0].failed:
            by_id[predictions[0].sample.id] = predictions
    if not by_id:
        return "<p>None.</p>"
    chosen = draw_rows([rows[0].sample for rows in by_id.values()], WRONG, first.seed)
    cards = [_wrong_row(by_id[sample.id], list(results), draw) for sample in chosen]
    note = f"<p>{len(by_id):,} of {len(first.predictions):,} rows"
    if len(by_id) > len(chosen):
        note += f"; {len(chosen)} of them, of each kind its share"
    return f"{note}.</p><div class=rows>{''.join(cards)}</div>"


def _wrong_row(predictions: Sequence[Prediction], names: Sequence[str], draw: Draw) -> str:
    sample = predictions[0].sample
    pictures = "".join(f'<img alt="" src="data:image/png;base64,{data}">' for data in draw(sample))
    files = ", ".join(part.path for part in sample.media)
    lines = [f"<tr><td>true</td><td><b>{text(sample.answer or '')}</b></td></tr>"]
    for name, prediction in zip(names, predictions, strict=True):
        lines.append(f"<tr><td>{_named(name)}</td><td>{_answer(prediction)}</td></tr>")
    head = f"<small>{text(sample.kind or 'none')} · {text(sample.id)} · {text(files)}</small>"
    question = f"<div>{text(sample.last_question)}</div>"
    return f"<div class=row>{pictures}{head}{question}<table>{''.join(lines)}</table></div>"


def _answer(prediction: Prediction) -> str:
    """Return an answer, coloured where it is right or wrong."""
    if prediction.failed:
        return f"<span class=wrong>{NOT_ASKED}</span>"
    shown = text(prediction.answer or "(nothing)")
    if prediction.score.error is not None:
        return f"{shown} <small>{prediction.score.error:.2f} s off</small>"
    if prediction.score.correct is None:
        return shown
    return f"<span class={'right' if prediction.score.correct else 'wrong'}>{shown}</span>"


def _answers(results: Mapping[str, Result]) -> str:
    """Return a table of the rows with their answers under all conditions."""
    rows = _rows(results)
    head = "".join(f"<th>{_named(name)}</th>" for name in results)
    lines = [f"<tr><th>id</th><th>kind</th><th>question</th><th>true</th>{head}</tr>"]
    for predictions in rows[:ROWS]:
        sample = predictions[0].sample
        columns = [sample.id, sample.kind or "none", sample.last_question, sample.answer or ""]
        cells = "".join(f"<td>{text(column)}</td>" for column in columns)
        cells += "".join(f"<td>{_answer(prediction)}</td>" for prediction in predictions)
        lines.append(f"<tr>{cells}</tr>")
    note = ""
    if len(rows) > ROWS:
        note = f"<p>The first {ROWS:,} of {len(rows):,} rows; --predictions writes all.</p>"
    table = f"<div class=scroll><table class=answers>{''.join(lines)}</table></div>"
    count = min(ROWS, len(rows))
    return f"<details><summary>{count:,} rows</summary>{note}{table}</details>"


def _failures(results: Mapping[str, Result]) -> str:
    """Return a table of the rows that could not be asked."""
    failures: dict[tuple[str, str, str], list[str]] = {}
    for name, result in results.items():
        for row in result.failed:
            key = (row["id"], row["reason"], row["detail"])
            failures.setdefault(key, []).append(name)
    if not failures:
        return ""
    reasons = Counter(reason for _, reason, _ in failures)
    counts = ", ".join(f"{count:,} {text(reason)}" for reason, count in reasons.most_common())
    lines = ["<tr><th>id</th><th>reason</th><th>seen</th><th>conditions</th></tr>"]
    for (identity, reason, detail), names in list(failures.items())[:FAILED]:
        cells = f"<td>{text(identity)}</td><td>{text(reason)}</td><td>{text(detail)}</td>"
        lines.append(f"<tr>{cells}<td>{', '.join(map(_named, names))}</td></tr>")
    return f"<h2>Rows not asked</h2><p>{counts}</p><table>{''.join(lines)}</table>"


def _details(about: About) -> str:
    written = json.dumps(about.details, indent=1, ensure_ascii=False, default=str)
    return f"<pre>{text(written, 20_000)}</pre>"
