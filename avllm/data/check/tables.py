"""Print the results of `avllm data check`, `stats` and `mix`; hints go to stderr."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from avllm.data.check.reasons import REASONS
from avllm.data.check.report import CheckReport
from avllm.data.check.stats import RowTotals, Stats
from avllm.data.mixture import Portion


def print_report(console: Console, report: CheckReport, output: Path | None, counted: bool) -> None:
    """Print each reason with an example, how many rows have errors, and which to fix by hand.

    Args:
        console: for the results.
        report: of the check.
        output: the folder with the page.
        counted: whether tokens were.
    """
    if report.reasons:
        # A terminal gets lines of its width; a log or a pipe gets all text.
        console.print(_reasons_table(report, cut=console.is_terminal))
    if not counted:
        Console(stderr=True).print(
            "tokens were not counted: give --preset (or --checkpoint) to find rows that are too "
            "long for it",
        )
    pages = f"; see {output / 'check.html'}, and quarantine.txt beside it" if output else ""
    console.print(
        f"{sum(report.rows.values()):,} rows, {report.files:,} files ({report.reused:,} from the "
        f"journal): {report.count('error'):,} rows with errors, "
        f"{report.count('warning'):,} with warnings{pages}",
        highlight=False,
        markup=False,
    )
    for sentence in report.advice():
        console.print(sentence, style="red", highlight=False, markup=False)


def _reasons_table(report: CheckReport, cut: bool) -> Table:
    """Return a table of the reasons; ``cut`` shortens what does not fit into a line."""
    table = Table(box=None, pad_edge=False, expand=True)
    table.add_column("", no_wrap=True)
    table.add_column("reason", no_wrap=True)
    table.add_column("rows", justify="right", no_wrap=True)
    overflow: Literal["ellipsis", "fold"] = "ellipsis" if cut else "fold"
    table.add_column("meaning, and an example", overflow=overflow, no_wrap=cut, ratio=1)
    for reason in report.ranked():
        about = REASONS[reason]
        seen = [f"[dim]{escape(_one_line(text))}[/]" for text in _seen(report, reason)]
        colour = "red" if about.severity == "error" else "yellow"
        table.add_row(
            f"[{colour}]{about.severity}[/]",
            reason,
            f"{report.reasons[reason]:,}",
            "\n".join([about.meaning, *seen]),
        )
    return table


def _seen(report: CheckReport, reason: str) -> list[str]:
    """Return the first example of a reason, its file, and rows; of several mistakes, each one."""
    mistakes = report.mistakes[reason]
    finding = report.examples[reason][0]
    texts = [f"{finding.id or finding.location}: {finding.detail}"]
    if finding.path:
        texts.append(finding.path)
    for name, rows in mistakes.items():
        count = f"{rows.rows:,} x {name}: " if name else ""
        texts.append(f"{count}{rows.where()}")
    return texts


def _one_line(text: str) -> str:
    return " ".join(text.split())


def print_stats(console: Console, stats: Stats, opened: bool) -> None:
    """Print one table, and the rows that it leaves out; ``opened``: whether the files were."""
    console.print(_stats_table(stats))
    if stats.total.unknown and not opened:
        Console(stderr=True).print("give --probe to open the files for the length of their clips")
    if stats.refused:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in stats.refused.most_common())
        console.print(
            f"{stats.total.refused:,} rows have no tokens, since training leaves them out: "
            f"{reasons}; see `avllm data check`",
            highlight=False,
        )
    if stats.malformed:
        console.print(f"{stats.malformed:,} malformed lines; see `avllm data check`")


@dataclass(frozen=True)
class _Column:
    """Describe a column of the table of statistics."""

    name: str
    cell: Callable[[RowTotals], str]
    shown: bool = True


def _columns(total: RowTotals) -> list[_Column]:
    """Return the columns that hold something for some row."""
    opened = total.sound + total.no_sound > 0
    columns = [
        _Column("rows", lambda t: f"{t.rows:,}"),
        _Column("hours", lambda t: f"{t.seconds / 3600:,.2f}", total.seconds > 0),
        _Column("clips of unknown length", lambda t: f"{t.unknown:,}", total.unknown > 0),
        _Column("with sound", lambda t: f"{t.sound:,}", opened),
        _Column("mute", lambda t: f"{t.no_sound:,}", opened),
        _Column("words an answer", lambda t: f"{t.words / max(1, t.rows):.1f}"),
        _Column("tokens", lambda t: f"{t.tokens:,}", total.tokens > 0),
        _Column("refused rows", lambda t: f"{t.refused:,}", total.refused > 0),
    ]
    return [column for column in columns if column.shown]


def _stats_table(stats: Stats) -> Table:
    """Return a table of all groups, one below the other, and of the sum of all rows."""
    columns = _columns(stats.total)
    table = Table(box=None, pad_edge=False)
    table.add_column("", overflow="fold", min_width=20)
    for column in columns:
        table.add_column(column.name, justify="right")
    for group, totals_by_name in stats.by.items():
        table.add_row(f"[bold]{group}[/]")
        by_size = sorted(totals_by_name.items(), key=lambda item: -item[1].rows)
        for name, totals in by_size:
            table.add_row(f"  {escape(name)}", *(column.cell(totals) for column in columns))
    table.add_row("[bold]all[/]", *(column.cell(stats.total) for column in columns))
    return table


def print_mixture(console: Console, portions: list[Portion], temperature: float) -> None:
    """Print a line for each source."""
    table = Table(box=None, pad_edge=False)
    table.add_column("manifest", overflow="fold", min_width=20)
    for name in ("weight", "max_rows", "rows", "items", "drawn", "share", "epochs"):
        table.add_column(name, justify="right")
    for portion in portions:
        table.add_row(
            escape(portion.manifest),
            str(portion.weight),
            "" if portion.max_rows is None else f"{portion.max_rows:,}",
            f"{portion.rows:,}",
            f"{portion.items:,}",
            f"{portion.drawn:,}",
            f"{portion.share:.1%}",
            f"{portion.epochs:.2f}",
        )
    console.print(table)
    if temperature != 1:
        console.print(
            f"temperature {temperature:g}: sizes count by their power 1/{temperature:g}",
            highlight=False,
        )
