"""A check's report as one page that stands on its own: tables, histograms, pictures of what is wrong."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from avllm.data.check_reasons import REASONS, Finding

if TYPE_CHECKING:
    from avllm.data.check import Report

BINS, WIDTH, HEIGHT = 30, 420, 120
UNITS = {"seconds": "s", "frames": "frames read", "sound level": "dB of full scale", "tokens": "tokens of a row"}
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1100px; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: .6em 0 1.6em; width: 100% }
th, td { text-align: left; padding: .25em .7em .25em 0; border-bottom: 1px solid #ddd; vertical-align: top }
td.n, th.n { text-align: right } .error { color: #b00020 } .warning { color: #8a5a00 }
code { font-size: 90%; overflow-wrap: anywhere } figure { display: inline-block; margin: 0 1em 1em 0 }
figcaption { font-size: 85%; color: #555; max-width: 430px; overflow-wrap: anywhere } img { height: 120px }
summary { cursor: pointer; margin: .3em 0 }
"""


def write_page(report: Report, path: Path) -> None:
    """Write the page."""
    rows, bad = sum(report.rows.values()), report.count("error")
    parts = [
        f"<h1>Data check</h1><p>{rows:,} rows in {len(report.rows)} manifests, {report.files:,} files "
        f"({report.reused:,} known from before): <b class=error>{bad:,} rows with errors</b>, "
        f"<b class=warning>{report.count('warning'):,} with warnings</b>; {report.seconds:.1f} s.</p>",
        *(f"<p class=error>{html.escape(each)}</p>" for each in report.mending()),
        _table(("manifest", "rows"), report.rows.items()),
        "<h2>By source</h2>",
        _table(
            ("source", "rows", "errors", "warnings"),
            [(s, c["rows"], c["error"], c["warning"]) for s, c in sorted(report.sources.items())],
        ),
        "<h2>What was found</h2>",
        _reasons(report),
        "<h2>Distributions</h2>",
        *(histogram(name, UNITS.get(name, ""), values) for name, values in report.values.items() if len(values)),
        "<h2>Slowest files</h2>",
        _table(("seconds", "file"), report.slowest),
    ]
    body = "\n".join(parts)
    page = f"<!doctype html><html lang=en><meta charset=utf-8><title>Data check</title><style>{STYLE}</style>{body}"
    path.write_text(page + "</html>\n", encoding="utf-8")


def _table(names: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = "".join("<tr>" + "".join(_cell(value) for value in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _cell(value: object) -> str:
    if isinstance(value, int | float):
        return f"<td>{value:,}</td>"
    return f"<td>{html.escape(str(value))}</td>"


def _reasons(report: Report) -> str:
    """For each reason: how many rows, what it means, examples with pictures."""
    order = sorted(report.reasons, key=lambda r: (REASONS[r].severity, -report.reasons[r]))
    if not order:
        return "<p>Nothing.</p>"
    return "\n".join(_reason(report, reason) for reason in order)


def _reason(report: Report, reason: str) -> str:
    about, found = REASONS[reason], report.examples[reason]
    rows = [(f.id, f"{Path(f.manifest).name}:{f.line}", f.path or "", f.detail) for f in found]
    shown = dict.fromkeys(f.path for f in found if f.path in report.thumbnails)
    pictures = "".join(_picture(report.thumbnails[p], p) for p in list(shown)[:6] if p is not None)
    title = f"<b class={about.severity}>{reason}</b>: {report.reasons[reason]:,} rows; {html.escape(about.meaning)}"
    opened = " open" if about.severity == "error" else ""
    note = f"<p>What helps: {html.escape(about.advice)}.{_more(report, reason, found)}</p>"
    table = _table(("id", "line", "file", "seen"), rows)
    return f"<details{opened}><summary>{title}</summary>{note}{pictures}{table}</details>"


def _more(report: Report, reason: str, found: list[Finding]) -> str:
    return f" The first {len(found)} are:" if report.reasons[reason] > len(found) else ""


def _picture(data: str, path: str) -> str:
    name = html.escape(Path(path).name)
    return f'<figure><img alt="{name}" src="data:image/jpeg;base64,{data}"><figcaption>{name}</figcaption></figure>'


def histogram(name: str, unit: str, values: Sequence[float]) -> str:
    """Bars as inline SVG: how many values lie in each of equal intervals."""
    low, high = min(values), max(values)
    step = (high - low) / BINS or 1.0
    counts = [0] * BINS
    for value in values:
        counts[min(BINS - 1, math.floor((value - low) / step))] += 1
    each, most = WIDTH / BINS, max(counts)
    bars = "".join(
        f'<rect x="{i * each:.1f}" y="{HEIGHT - HEIGHT * n / most:.1f}" width="{each - 1:.1f}" '
        f'height="{HEIGHT * n / most:.1f}" fill="#4477aa"><title>{low + i * step:.4g} to {low + (i + 1) * step:.4g}: '
        f"{n}</title></rect>"
        for i, n in enumerate(counts)
    )
    caption = f"{name} ({unit}): {len(values):,} values from {low:.4g} to {high:.4g}, most in one bar {most:,}"
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">{bars}</svg>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )
