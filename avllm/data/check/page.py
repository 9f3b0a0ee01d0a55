"""A check's report as one page that stands on its own: tables, histograms, pictures of what is wrong."""

from __future__ import annotations

import html
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from avllm.data.check.histogram import histogram
from avllm.data.check.reasons import REASONS, Finding
from avllm.data.check.report import Report

LONGEST_NAME, LONGEST_SEEN = 80, 400  # characters; check.json has the rest
UNITS = {"seconds": "of a clip", "frames": "of a clip", "sound level": "dB of full scale", "tokens": "of a row"}
STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #888; --bar: #4a7fb5; --error: #d0342c; --warning: #b07400 }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1100px; padding: 0 1em }
h1 { margin-bottom: .2em } h2 { margin: 1.8em 0 .4em }
.cards { display: flex; flex-wrap: wrap; gap: .8em; margin: 1em 0 }
.cards div { border: 1px solid var(--line); border-radius: 8px; padding: .5em 1.1em; color: var(--soft) }
.cards b { display: block; font-size: 1.6em; font-weight: 600; color: CanvasText }
.error, .cards .error b { color: var(--error) } .warning, .cards .warning b { color: var(--warning) }
.mend { border-left: 4px solid var(--error); padding: .3em .8em }
table { border-collapse: collapse; margin: .4em 0 1em; width: 100% }
th { font-weight: 600; color: var(--soft) } a { color: inherit }
th, td { text-align: left; padding: .3em .9em .3em 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere }
th.n, td.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
td.share { width: 20%; min-width: 6em; padding-top: .8em }
td.share span { display: block; height: .55em; min-width: 2px; border-radius: 3px; background: currentColor }
td.picture img { max-width: 100%; max-height: 72px; border-radius: 4px; display: block }
.file { font-family: ui-monospace, monospace; font-size: 87% } .overview td { overflow-wrap: normal }
.examples { table-layout: fixed } .examples .picture { width: 8em } .examples .id { width: 18% }
.examples .line { width: 14% } .examples .file { width: 24% }
details { border-bottom: 1px solid var(--line); padding: .3em 0 } summary { cursor: pointer; padding: .2em 0 }
details p { margin: .3em 0; color: var(--soft) }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 1em 2em }
figure { margin: 0 } figcaption { font-size: 87%; color: var(--soft) } svg { width: 100%; height: auto }
svg text { font-size: 11px; fill: var(--soft) }
"""


def write_page(report: Report, path: Path) -> None:
    """Write the page."""
    plots = [histogram(name, unit, report.values[name]) for name, unit in UNITS.items() if report.values.get(name)]
    parts = [
        "<h1>Data check</h1>",
        _cards(report),
        *(f"<p class=mend>{html.escape(each)}</p>" for each in report.mending()),
        "<h2>What was found</h2>",
        _overview(report),
        "<h2>Distributions</h2>",
        f"<div class=plots>{''.join(plots)}</div>" if plots else "<p>Nothing could be measured.</p>",
        "<h2>Examples</h2>" if report.reasons else "",
        *(_reason(report, reason) for reason in report.ranked()),
        "<h2>Sources</h2>",
        _table(
            ("source", "rows", "with errors", "with warnings"),
            [(s, c["rows"], c["error"], c["warning"]) for s, c in sorted(report.sources.items())],
        ),
        _table(("manifest", "rows"), report.rows.items()),
        "<h2>Slowest files</h2>",
        _table(("file", "seconds of one core"), [(path, seconds) for seconds, path in report.slowest]),
    ]
    body = "\n".join(parts)
    head = '<meta charset=utf-8><meta name=viewport content="width=device-width"><title>Data check</title>'
    page = f"<!doctype html><html lang=en><head>{head}<style>{STYLE}</style></head><body>{body}</body></html>\n"
    path.write_text(page, encoding="utf-8")


def _cards(report: Report) -> str:
    rows = sum(report.rows.values())
    bad, warned = report.count("error"), report.count("warning")
    cards = [
        ("", f"{rows:,}", "rows"),
        ("", f"{report.files:,}", "files" + (f", {report.reused:,} known from before" if report.reused else "")),
        ("error" if bad else "", f"{bad:,}", f"rows with errors ({bad / max(1, rows):.1%})"),
        ("warning" if warned else "", f"{warned:,}", f"rows with warnings ({warned / max(1, rows):.1%})"),
        ("", f"{report.seconds:,.0f} s", "took the check"),
    ]
    return "<div class=cards>" + "".join(f'<div class="{c}"><b>{n}</b>{t}</div>' for c, n, t in cards) + "</div>"


def _overview(report: Report) -> str:
    """Each reason with its number of rows, as a bar beside the others."""
    if not report.reasons:
        return "<p>Nothing.</p>"
    most, rows = max(report.reasons.values()), []
    for reason in report.ranked():
        about, count = REASONS[reason], report.reasons[reason]
        bar = f'<span style="width:{100 * count / most:.1f}%"></span>'
        rows.append(
            f"<tr><td class={about.severity}>{about.severity}</td><td><a href=#{reason}>{reason}</a></td>"
            f"<td class=n>{count:,}</td><td class='share {about.severity}'>{bar}</td>"
            f"<td>{html.escape(about.meaning)}</td></tr>"
        )
    head = "<tr><th></th><th>reason</th><th class=n>rows</th><th></th><th></th></tr>"
    return f"<table class=overview>{head}{''.join(rows)}</table>"


def _reason(report: Report, reason: str) -> str:
    """What a reason means, what helps, and examples with pictures."""
    about, found = REASONS[reason], report.examples[reason]
    title = f"<b class={about.severity}>{reason}</b>: {report.reasons[reason]:,} rows; {html.escape(about.meaning)}"
    note = f"What helps: {html.escape(about.advice)}."
    if report.reasons[reason] > len({(f.manifest, f.line) for f in found}):
        note += " Some of them, findings.jsonl has all:"
    opened = " open" if about.severity == "error" else ""
    body = f"<p id={reason}>{note}</p>{_examples(found, report.thumbnails)}"  # inside: a link to it opens the details
    return f"<details{opened}><summary>{title}</summary>{body}</details>"


def _examples(found: Sequence[Finding], pictures: dict[str, str]) -> str:
    shown = any(f.path in pictures for f in found)
    rows = []
    for f in found:
        line = f"<td>{html.escape(os.path.basename(f.manifest))}:{f.line}</td>"
        file = f'<td class=file title="{html.escape(f.path or "")}">{_cut(_name(f), LONGEST_NAME)}</td>'
        texts = f"<td>{_cut(f.id, LONGEST_NAME)}</td>{line}{file}<td>{_cut(f.detail, LONGEST_SEEN)}</td>"
        rows.append(f"<tr>{_picture(pictures.get(f.path or '', '')) if shown else ''}{texts}</tr>")
    head = "".join(f"<th class={name}>{name}</th>" for name in ("id", "line", "file", "seen"))
    picture = "<th class=picture></th>" if shown else ""
    return f"<table class=examples><tr>{picture}{head}</tr>{''.join(rows)}</table>"


def _picture(data: str) -> str:
    image = f'<img alt="" loading=lazy src="data:image/jpeg;base64,{data}">' if data else ""
    return f"<td class=picture>{image}</td>"


def _name(finding: Finding) -> str:
    """The file as a row would name it: relative to the manifest's folder where it lies in there."""
    folder = os.path.dirname(os.path.abspath(finding.manifest)) + os.sep
    return (finding.path or "").removeprefix(folder)


def _cut(text: str, longest: int) -> str:
    return html.escape(text if len(text) <= longest else text[: longest - 3] + "...")


def _table(names: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    head = "".join(f"<th{' class=n' if i else ''}>{html.escape(name)}</th>" for i, name in enumerate(names))
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _cell(value: object) -> str:
    if isinstance(value, int | float):
        return f"<td class=n>{value:,}</td>"
    return f"<td>{html.escape(str(value))}</td>"
