"""Turn a data set, in the form in which its authors distribute it, into manifests.

A recipe is one file ``data_recipes/NAME.py`` with three things::

    ABOUT = Dataset(title=..., licence=..., size=..., where=..., layout=..., citation=...)

    def rows(source: Path, own_option: int = 5) -> Iterator[RecipeRow | Drop]:
        for record in read_csv(source / "train.csv", ("clip", "caption")):
            ...

    if __name__ == "__main__":
        recipe.main(ABOUT, rows)

``rows`` reads the authors' files and decodes nothing. This module makes the command line from its
parameters, checks the source folder, the media files and each row, and writes the manifests and an
account of what was left out.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from avllm import __version__
from avllm.data.store.append_only import LockedError
from avllm.data.store.storage import StoreError, local_path
from avllm.log import set_up
from avllm.recipes.about import Dataset, check_layout
from avllm.recipes.captions import caption_messages, caption_prompt, caption_samples
from avllm.recipes.media import files_by_stem, first_file, lacking
from avllm.recipes.output import Output
from avllm.recipes.readers import (
    SPLITS,
    RecipeError,
    Record,
    open_text,
    read_csv,
    read_json,
    read_jsonl,
)
from avllm.recipes.rows import Drop, RecipeRow, drops_of, rows_of
from avllm.recipes.writer import RecipeReport, RowWriter

__all__ = [
    "SPLITS",
    "Dataset",
    "Drop",
    "RecipeError",
    "Record",
    "RecipeReport",
    "RecipeRow",
    "caption_messages",
    "caption_prompt",
    "caption_samples",
    "drops_of",
    "files_by_stem",
    "first_file",
    "main",
    "make",
    "open_text",
    "read_csv",
    "read_json",
    "read_jsonl",
    "rows_of",
]

Rows = Callable[..., Iterator[RecipeRow | Drop]]
"""A recipe's generator: takes the source folder and the recipe's options."""


def make(
    about: Dataset,
    rows: Rows,
    source: Path,
    output: Path,
    *,
    name: str | None = None,
    limit: int | None = None,
    **options: Any,
) -> RecipeReport:
    """Run a recipe and write its manifests into a folder.

    The files are ``<split>.jsonl``, ``dropped.jsonl``, ``missing.txt`` and ``recipe.json``.

    Args:
        about: the data set.
        rows: the recipe's generator.
        source: the data set's folder.
        output: the folder that is written.
        name: the ``source`` of each row; the recipe's file name when None.
        limit: stop after this many rows.
        options: the recipe's own; a recipe that writes media itself takes ``output``, the folder,
            as one of them.

    Raises:
        RecipeError: the source is not as it has to be, or no row was written (``no_rows``;
            ``dropped.jsonl`` and ``missing.txt`` say why).
        LockedError: another run writes there.
        StoreError: ``output`` is a URL.
    """
    output = local_path(output)
    check_layout(about, source)
    lacking.cache_clear()
    name = name or Path(inspect.getfile(rows)).stem
    arguments = dict(options)
    if "output" in inspect.signature(rows).parameters:
        arguments["output"] = output
    with ExitStack() as stack:
        writer = RowWriter(about, name, source, Output(output, name, stack))
        report = writer.report
        bar = stack.enter_context(_progress())
        task = bar.add_task(name, total=None, written=0, dropped=0)
        for item in rows(source, **arguments):
            writer.write(item)
            written = report.rows.total()
            bar.update(task, written=written, dropped=report.dropped.total())
            if limit is not None and written >= limit:
                break
        if not report.rows:
            writer.output.finish_empty()
            raise RecipeError(f"{source}: no row was kept{writer.why_nothing()}", reason="no_rows")
        writer.output.finish(account(about, name, rows, options | {"limit": limit}, report))
    return report


def account(
    about: Dataset, name: str, rows: Rows, options: dict[str, Any], report: RecipeReport
) -> dict[str, Any]:
    """Return the content of ``recipe.json``; it does not change from one run to the next."""
    plain = {key: str(v) if isinstance(v, Path) else v for key, v in options.items()}
    return {
        "recipe": name,
        "about": asdict(about),
        "options": plain,
        **report.to_dict(),
        "versions": {
            "avllm": __version__,
            "recipe_sha256": hashlib.sha256(Path(inspect.getfile(rows)).read_bytes()).hexdigest(),
        },
    }


def _progress() -> Progress:
    console = Console(stderr=True)
    counts = "{task.fields[written]:,} rows, {task.fields[dropped]:,} left out"
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}: " + counts),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def own_options(rows: Rows) -> list[inspect.Parameter]:
    """Return the parameters of ``rows`` after the source, without ``output``, which is the frame's.

    Each has its type, with the help text of ``Annotated``, and is a keyword.
    """
    hints = get_type_hints(rows, include_extras=True)
    _, *parameters = inspect.signature(rows).parameters.values()
    return [
        parameter.replace(
            annotation=hints.get(parameter.name, str), kind=inspect.Parameter.KEYWORD_ONLY
        )
        for parameter in parameters
        if parameter.name != "output"
    ]


def command(about: Dataset, rows: Rows) -> typer.Typer:
    """Return the command line of a recipe, with an option for each parameter of ``rows``."""

    def run(
        source: Annotated[Path, typer.Argument(help="The data set's folder.")],
        *,
        output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the manifests.")],
        limit: Annotated[int | None, typer.Option(min=1, help="Stop after this many rows.")] = None,
        allow_missing: Annotated[
            bool, typer.Option("--allow-missing", help="Missing media are no failure.")
        ] = False,
        as_json: Annotated[
            bool, typer.Option("--json", help="Print one JSON object, as last line.")
        ] = False,
        **options: Any,
    ) -> None:
        try:
            report = make(about, rows, source, output, limit=limit, **options)
        except (RecipeError, LockedError, StoreError) as error:
            raise _failed(str(error)) from error
        except OSError as error:  # a full disk, a folder without permission
            raise _failed(f"{error.filename or output}: {error.strerror or error}") from error
        except ValueError as error:  # of a reader, about a file's content
            raise _failed(f"{source} -> {output}: {type(error).__name__}: {error}") from error
        _print(about, report, output, as_json)
        if report.missing_files and not allow_missing:
            raise _failed(
                f"{report.missing_files:,} media files are missing or empty; "
                f"{output / 'missing.txt'} names them. The manifests hold the other rows. "
                "Get the files and run again, or add --allow-missing"
            )

    _take_options(run, own_options(rows))
    lines = "\n".join(line.strip() for line in about.layout.strip().splitlines())
    # \b keeps the lines of a paragraph in the help.
    facts = f"Licence: {about.licence}\n\nGet it: {about.where}"
    run.__doc__ = f"{about.title}\n\n{facts}\n\n\b\nExpected:\n{lines}"
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(run)
    return app


def _take_options(run: Callable[..., None], options: list[inspect.Parameter]) -> None:
    """Put options in the place of a function's ``**options``, for Typer to read."""
    hints = get_type_hints(run, include_extras=True)
    own = [
        parameter.replace(annotation=hints[parameter.name])
        for parameter in inspect.signature(run).parameters.values()
        if parameter.kind != inspect.Parameter.VAR_KEYWORD
    ]
    parameters = [*own[:2], *options, *own[2:]]  # source and output come first in the help
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}


def _failed(message: str) -> typer.Exit:
    typer.echo(f"error: {message}", err=True)
    return typer.Exit(1)


def _print(about: Dataset, report: RecipeReport, output: Path, as_json: bool) -> None:
    console = Console()
    console.print(f"{about.title} -> {output}", markup=False, highlight=False, soft_wrap=True)
    table = Table()
    table.add_column("split or reason")
    table.add_column("rows", justify="right")
    for name, count in sorted(report.rows.items()):
        table.add_row(f"{name}.jsonl", f"{count:,}")
    for name, count in sorted(report.dropped.items()):
        table.add_row(f"left out: {name}", f"{count:,}", style="yellow")
    console.print(table)
    if as_json:
        typer.echo(json.dumps({"output": str(output), **report.to_dict()}))


def main(about: Dataset, rows: Rows, argv: list[str] | None = None) -> None:
    """Run a recipe from the command line.

    The process ends with 1 when the run failed or media files are missing.
    """
    set_up()
    if argv is None:
        argv = sys.argv[1:]
    command(about, rows)(argv)
