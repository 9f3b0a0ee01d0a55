"""Write a check's report as one self-contained page: tables, histograms and pictures."""

from __future__ import annotations

import html
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from avllm.data.check.histogram import histogram
from avllm.data.check.reasons import REASONS, Finding
from avllm.data.check.report import CheckReport

LONGEST_NAME = 80  # characters; check.json has the rest
LONGEST_DETAIL = 400
UNITS = {
    "seconds": "of a clip",
    "frames": "of a clip",
    "sound level": "dB of full scale",
    "tokens": "of a row",
}
STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #888; --bar: #4a7fb5;
  --error: #d0342c; --warning: #b07400 }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1100px; padding: 0 1em }
h1 { margin-bottom: .2em } h2 { margin: 1.8em 0 .4em }
.cards { display: flex; flex-wrap: wrap; gap: .8em; margin: 1em 0 }
.cards div { border: 1px solid var(--line); border-radius: 8px; padding: .5em 1.1em;
  color: var(--soft) }
.cards b { display: block; font-size: 1.6em; font-weight: 600; color: CanvasText }
.error, .cards .error b { color: var(--error) }
.warning, .cards .warning b { color: var(--warning) }
.fix { border-left: 4px solid var(--error); padding: .3em .8em }
table { border-collapse: collapse; margin: .4em 0 1em; width: 100% }
th { font-weight: 600; color: var(--soft) } a { color: inherit }
th, td { text-align: left; padding: .3em .9em .3em 0; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: anywhere }
th.n, td.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
td.share { width: 20%; min-width: 6em; padding-top: .8em }
td.share span { display: block; height: .55em; min-width: 2px; border-radius: 3px;
  background: currentColor }
td.picture img { max-width: 100%; max-height: 72px; border-radius: 4px; display: block }
.file { font-family: ui-monospace, monospace; font-size: 87% }
.overview td { overflow-wrap: normal }
.examples { table-layout: fixed } .examples .picture { width: 8em } .examples .id { width: 18% }
.examples .line { width: 14% } .examples .file { width: 24% }
details { border-bottom: 1px solid var(--line); padding: .3em 0 }
summary { cursor: pointer; padding: .2em 0 }
details p { margin: .3em 0; color: var(--soft) }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 1em 2em }
figure { margin: 0 } figcaption { font-size: 87%; color: var(--soft) }
svg { width: 100%; height: auto }
svg text { font-size: 11px; fill: var(--soft) }
"""


def write_page(report: CheckReport, path: Path) -> None:
    """Write the page."""
    body = "\n".join(
        [
            "<h1>Data check</h1>",
            _cards(report),
            *(f"<p class=fix>{html.escape(sentence)}</p>" for sentence in report.advice()),
            "<h2>Findings</h2>",
            _overview(report),
            "<h2>Distributions</h2>",
            _plots(report),
            "<h2>Examples</h2>" if report.reasons else "",
            *(_details(report, reason) for reason in report.ranked()),
            "<h2>Sources</h2>",
            _sources(report),
            table(("manifest", "rows"), report.rows.items()),
            "<h2>Slowest files</h2>",
            table(("file", "seconds of one core"), [(file, s) for s, file in report.slowest]),
        ]
    )
    path.write_text(document("Data check", body), encoding="utf-8", errors="replace")


def document(title: str, body: str, style: str = "") -> str:
    """Return a whole page that loads nothing from outside, whatever its texts hold.

    Args:
        title: plain text. body: HTML. style: CSS beside that of all pages.
    """
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = (
        f'<meta charset=utf-8><meta http-equiv=Content-Security-Policy content="{policy}">'
        '<meta name=viewport content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}{style}</style>"
    )
    return f"<!doctype html><html lang=en><head>{head}</head><body>{body}</body></html>\n"


def _cards(report: CheckReport) -> str:
    """Return the numbers at the top of the page."""
    rows = sum(report.rows.values())
    errors = report.count("error")
    warnings = report.count("warning")
    reused = f", {report.reused:,} from the journal" if report.reused else ""
    cards = [
        card(f"{rows:,}", "rows"),
        card(f"{report.files:,}", f"files{reused}"),
        card(f"{errors:,}", f"rows with errors ({errors / max(1, rows):.1%})", errors, "error"),
        card(
            f"{warnings:,}",
            f"rows with warnings ({warnings / max(1, rows):.1%})",
            warnings,
            "warning",
        ),
        card(f"{report.seconds:,.0f} s", "duration of the check"),
    ]
    return f"<div class=cards>{''.join(cards)}</div>"


def card(number: str, text: str, count: int = 0, severity: str = "") -> str:
    """Return a card, coloured by severity when there is something to count."""
    return f'<div class="{severity if count else ""}"><b>{number}</b>{text}</div>'


def _plots(report: CheckReport) -> str:
    measured = [name for name in UNITS if report.values.get(name)]
    plots = [histogram(name, UNITS[name], report.values[name]) for name in measured]
    if not plots:
        return "<p>Nothing could be measured.</p>"
    return f"<div class=plots>{''.join(plots)}</div>"


def _sources(report: CheckReport) -> str:
    rows = [
        (source, counts["rows"], counts["error"], counts["warning"])
        for source, counts in sorted(report.sources.items())
    ]
    return table(("source", "rows", "with errors", "with warnings"), rows)


def _overview(report: CheckReport) -> str:
    """Return a table of the reasons, with the number of rows as bars."""
    if not report.reasons:
        return "<p>Nothing.</p>"
    most = max(report.reasons.values())
    rows = []
    for reason in report.ranked():
        about = REASONS[reason]
        count = report.reasons[reason]
        bar = f'<span style="width:{100 * count / most:.1f}%"></span>'
        rows.append(
            f"<tr><td class={about.severity}>{about.severity}</td>"
            f"<td><a href=#{reason}>{reason}</a></td>"
            f"<td class=n>{count:,}</td><td class='share {about.severity}'>{bar}</td>"
            f"<td>{html.escape(about.meaning)}</td></tr>"
        )
    head = "<tr><th></th><th>reason</th><th class=n>rows</th><th></th><th></th></tr>"
    return f"<table class=overview>{head}{''.join(rows)}</table>"


def _details(report: CheckReport, reason: str) -> str:
    """Return meaning and advice of a reason, and examples with pictures."""
    about = REASONS[reason]
    findings = report.examples[reason]
    count = report.reasons[reason]
    title = f"<b class={about.severity}>{reason}</b>: {count:,} rows; {html.escape(about.meaning)}"
    note = f"Advice: {html.escape(about.advice)}."
    if count > len({(finding.manifest, finding.line) for finding in findings}):
        note += " Some of them, findings.jsonl has all:"
    opened = " open" if about.severity == "error" else ""
    # The anchor is inside, so that a link to it opens the details.
    content = f"<p id={reason}>{note}</p>{_mistakes(report, reason)}"
    content += _examples(findings, report.thumbnails)
    return f"<details{opened}><summary>{title}</summary>{content}</details>"


def _mistakes(report: CheckReport, reason: str) -> str:
    """Return a table of the mistakes that a reason is counted by; "" where it is one."""
    named = {name: rows for name, rows in report.mistakes[reason].items() if name}
    if not named:
        return ""
    return table(
        ("mistake", "rows", "first"),
        [(name, rows.rows, rows.where()) for name, rows in named.items()],
    )


def _examples(findings: Sequence[Finding], pictures: dict[str, str]) -> str:
    """Return a table of findings; it has a column of pictures when there is one."""
    with_pictures = any(finding.path in pictures for finding in findings)
    rows = "".join(_example(finding, pictures, with_pictures) for finding in findings)
    head = "<th class=picture></th>" if with_pictures else ""
    head += "".join(f"<th class={name}>{name}</th>" for name in ("id", "line", "file", "seen"))
    return f"<table class=examples><tr>{head}</tr>{rows}</table>"


def _example(finding: Finding, pictures: dict[str, str], with_pictures: bool) -> str:
    path = finding.path or ""
    picture = _picture(pictures.get(path, "")) if with_pictures else ""
    return (
        f"<tr>{picture}<td>{cut(finding.id, LONGEST_NAME)}</td>"
        f"<td>{html.escape(os.path.basename(finding.manifest))}:{finding.line}</td>"
        f'<td class=file title="{html.escape(path)}">{cut(_name(finding), LONGEST_NAME)}</td>'
        f"<td>{cut(finding.detail, LONGEST_DETAIL)}</td></tr>"
    )


def _picture(data: str) -> str:
    image = f'<img alt="" loading=lazy src="data:image/jpeg;base64,{data}">' if data else ""
    return f"<td class=picture>{image}</td>"


def _name(finding: Finding) -> str:
    """Return the file relative to the manifest's folder, where it lies in that folder."""
    folder = os.path.dirname(os.path.abspath(finding.manifest)) + os.sep
    return (finding.path or "").removeprefix(folder)


def cut(text: str, longest: int) -> str:
    """Return a text for the page: escaped, and at most ``longest`` characters long."""
    return html.escape(text if len(text) <= longest else text[: longest - 3] + "...")


def table(names: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table; all columns but the first hold numbers."""
    head = "".join(f"<th class=n>{html.escape(name)}</th>" for name in names[1:])
    body = ""
    for row in rows:
        cells = "".join(_cell(value) for value in row)
        body += f"<tr>{cells}</tr>"
    return f"<table><tr><th>{html.escape(names[0])}</th>{head}</tr>{body}</table>"


def _cell(value: object) -> str:
    if isinstance(value, int | float):
        return f"<td class=n>{value:,}</td>"
    return f"<td>{html.escape(str(value))}</td>"
