"""What `avllm data check`, `stats` and `mix` say on a terminal, on stderr: stdout is for --json."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from avllm.data.check.reasons import REASONS
from avllm.data.check.report import Report
from avllm.data.check.stats import Share, Stats
from avllm.data.mixture import Portion


def print_report(report: Report, output: Path | None, counted: bool) -> None:
    """Each reason with an example, then how many rows have errors, and which have to be mended.

    Args:
        output: the folder that the page is in. counted: whether tokens were.
    """
    console = Console(stderr=True)
    table = Table(box=None, pad_edge=False, expand=True)
    columns: list[tuple[str, Literal["left", "right"]]] = [("", "left"), ("reason", "left"), ("rows", "right")]
    for name, justify in columns:
        table.add_column(name, justify=justify, no_wrap=True)
    # a terminal gets lines of its width, a log or a pipe all that there is
    cut = console.is_terminal
    table.add_column("what it means, and an example", overflow="ellipsis" if cut else "fold", no_wrap=cut, ratio=1)
    for reason in report.ranked():
        about, first = REASONS[reason], report.examples[reason][0]
        example = f"{first.id or f'line {first.line}'}: {first.detail}"
        colour = "red" if about.severity == "error" else "yellow"
        told = f"{about.meaning}\n[dim]{escape(_one_line(example))}[/]"
        table.add_row(f"[{colour}]{about.severity}[/]", reason, f"{report.reasons[reason]:,}", told)
    if report.reasons:
        console.print(table)
    if not counted:
        console.print("tokens were not counted: give --preset (or --checkpoint) to find rows that are too long for it")
    console.print(
        f"{sum(report.rows.values()):,} rows, {report.files:,} files ({report.reused:,} known from before): "
        f"{report.count('error'):,} rows with errors, {report.count('warning'):,} with warnings"
        + ("" if output is None else f"; see {output / 'check.html'}, and quarantine.txt beside it"),
        highlight=False,
        markup=False,
    )
    for each in report.mending():
        console.print(each, style="red", highlight=False, markup=False)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def print_stats(found: Stats, opened: bool) -> None:
    """One table, and the rows that are in none; ``opened``: whether the files were."""
    console = Console(stderr=True)
    console.print(_stats_table(found))
    if found.total.unknown and not opened:
        console.print("give --probe to open the files for the length of their clips")
    if found.refused:
        named = ", ".join(f"{count:,} {reason}" for reason, count in found.refused.most_common())
        said = f"{found.total.refused:,} rows have no tokens, since training leaves them out: {named}"
        console.print(f"{said}; see `avllm data check`", highlight=False)
    if found.malformed:
        console.print(f"{found.malformed:,} malformed lines; see `avllm data check`")


def _stats_table(found: Stats) -> Table:
    """All groups one below the other; columns of which no row knows anything are left out."""
    total = found.total
    columns: dict[str, tuple[bool, Callable[[Share], str]]] = {
        "rows": (True, lambda s: f"{s.rows:,}"),
        "hours": (total.seconds > 0, lambda s: f"{s.seconds / 3600:,.2f}"),
        "clips of unknown length": (total.unknown > 0, lambda s: f"{s.unknown:,}"),
        "with sound": (total.sound + total.no_sound > 0, lambda s: f"{s.sound:,}"),
        "mute": (total.sound + total.no_sound > 0, lambda s: f"{s.no_sound:,}"),
        "words an answer": (True, lambda s: f"{s.words / max(1, s.rows):.1f}"),
        "tokens": (total.tokens > 0, lambda s: f"{s.tokens:,}"),
        "refused rows": (total.refused > 0, lambda s: f"{s.refused:,}"),
    }
    shown = {name: tell for name, (there, tell) in columns.items() if there}
    table = Table(box=None, pad_edge=False)
    table.add_column("", overflow="fold", min_width=20)
    for name in shown:
        table.add_column(name, justify="right")
    for group, shares in {**found.by, "all": {"": total}}.items():
        table.add_row(f"[bold]{group}[/]", *([tell(total) for tell in shown.values()] if group == "all" else []))
        for name, share in sorted(shares.items(), key=lambda item: -item[1].rows) if group != "all" else []:
            table.add_row(f"  {escape(name)}", *(tell(share) for tell in shown.values()))
    return table


def print_mixture(found: list[Portion], temperature: float) -> None:
    """A line a source."""
    console = Console(stderr=True)
    table = Table(box=None, pad_edge=False)
    table.add_column("manifest", overflow="fold", min_width=20)
    for name in ("weight", "max_rows", "rows", "items", "drawn", "share", "epochs"):
        table.add_column(name, justify="right")
    for portion in found:
        settings = (str(portion.weight), "" if portion.max_rows is None else f"{portion.max_rows:,}")
        figures = (f"{portion.rows:,}", f"{portion.items:,}", f"{portion.drawn:,}", f"{portion.share:.1%}")
        table.add_row(escape(portion.manifest), *settings, *figures, f"{portion.epochs:.2f}")
    console.print(table)
    if temperature != 1:
        console.print(f"temperature {temperature:g}: sizes count by their power 1/{temperature:g}", highlight=False)
