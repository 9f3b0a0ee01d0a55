"""The frame of all recipes: a program that turns a data set, as its authors distribute it, into manifests.

A recipe is one file ``data_recipes/NAME.py`` with three things::

    ABOUT = Dataset(title=..., licence=..., size=..., where=..., layout=..., citation=...)

    def rows(source: Path, own_option: int = 5) -> Iterator[Row | Drop]:
        for record in read_csv(source / "train.csv", ("clip", "caption")):
            ...

    if __name__ == "__main__":
        recipe.main(ABOUT, rows)

``rows`` reads the authors' files and decodes nothing. The frame makes the command line from its parameters, checks the
source folder, the media files and each row, and writes the manifests and an account of what was left out.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from avllm import __version__
from avllm.data.manifest import describe
from avllm.data.schema import Sample
from avllm.data.store.append_only import LockedError
from avllm.data.store.storage import StoreError, local_path
from avllm.log import set_up
from avllm.recipes.about import Dataset, check_layout
from avllm.recipes.captions import caption_messages, caption_prompt, caption_samples
from avllm.recipes.output import Output
from avllm.recipes.readers import (
    EMPTY,
    MISSING,
    SPLITS,
    RecipeError,
    Record,
    files_by_stem,
    first_file,
    lacking,
    open_text,
    read_csv,
    read_json,
    read_jsonl,
)
from avllm.recipes.rows import Drop, Row, drops_of, rows_of

__all__ = [
    "SPLITS",
    "Dataset",
    "Drop",
    "RecipeError",
    "Record",
    "Report",
    "Row",
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

MEDIA = ("video", "audio", "image")


Rows = Callable[..., Iterator[Row | Drop]]


@dataclass
class Report:
    """What a recipe wrote: rows by split, drops by reason, missing or empty media, ids that got a number added."""

    rows: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    missing_files: int = 0
    numbered_ids: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As it stands in ``recipe.json``, sorted."""
        return {
            "rows": dict(sorted(self.rows.items())),
            "dropped": dict(sorted(self.dropped.items())),
            "missing_files": self.missing_files,
            "numbered_ids": self.numbered_ids,
        }


class _Maker:
    """Takes what a recipe yields, one by one: checks it, writes it, counts it."""

    def __init__(self, about: Dataset, name: str, source: Path, output: Output) -> None:
        self.about, self.name, self.source, self.output = about, name, source.resolve(), output
        self.report = Report()
        self.ids: dict[str, int] = {}  # the last number that was put behind an id
        self.missing: set[str] = set()
        self.first: Drop | None = None
        self.to_source = _relative(self.source, output.folder)

    def drop(self, drop: Drop) -> None:
        """Count and write down what a recipe leaves out."""
        if drop.reason in (MISSING, EMPTY):
            self.note_missing([drop.detail])
        self.leave_out(drop)

    def leave_out(self, drop: Drop) -> None:
        """Count and write down what is left out."""
        self.report.dropped[drop.reason] += 1
        self.first = self.first or drop
        self.output.line("dropped.jsonl", asdict(drop))

    def row(self, row: Row) -> None:
        """Write a row, or drop it: a field is wrong, or a media file is not there or empty."""
        data = {"source": self.name, "licence": self.about.licence} | row.sample
        where = str(data.get("id") or "a row without id")
        try:
            sample = Sample.model_validate(data)
        except ValidationError as error:
            self.leave_out(Drop("invalid_row", where, describe(error)))
            return
        found = {part.path: lacking(os.path.join(self.source, part.path)) for part in sample.media}
        useless = {path: reason for path, reason in found.items() if reason is not None}
        if useless:
            self.note_missing(useless)
            reason = MISSING if MISSING in useless.values() else EMPTY
            self.leave_out(Drop(reason, where, ", ".join(useless)))
            return
        data = sample.model_dump(mode="json", exclude_unset=True, exclude_none=True)
        data = {"id": self.unique(sample.id)} | {k: v for k, v in data.items() if k != "id"}
        for message in data["messages"]:
            message["content"] = [self.part(p) if p["type"] in MEDIA else p for p in message["content"]]
        self.output.line(f"{row.split}.jsonl", data)
        self.report.rows[row.split] += 1

    def why_not(self) -> str:
        """What was dropped, when all was."""
        if self.first is None:
            return "; nothing was there"
        folder, missing = self.output.folder, self.report.missing_files
        named = f"; {missing:,} media files, missing or empty, are named in {folder / 'missing.txt'}" if missing else ""
        counts = ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.report.dropped.items()))
        first = f"the first: {self.first.where}: {self.first.detail or self.first.reason}"
        return f"; left out: {counts}; {first}; all are in {folder / 'dropped.jsonl'}{named}"

    def note_missing(self, paths: Iterable[str]) -> None:
        """Write each missing or empty file down once."""
        for path in paths:
            if path not in self.missing:
                self.missing.add(path)
                self.report.missing_files += 1
                self.output.open("missing.txt").write(path + "\n")

    def unique(self, sample_id: str) -> str:
        """The id, with a number behind it when it was there before."""
        found, number = sample_id, self.ids.get(sample_id, 1)
        while found in self.ids:
            number += 1
            found = f"{sample_id}~{number}"
        self.ids[sample_id] = number
        self.ids.setdefault(found, 1)
        self.report.numbered_ids += found != sample_id
        return found

    def part(self, part: dict[str, Any]) -> dict[str, Any]:
        """A media part with its path as the manifest names it."""
        kind = part["type"]
        return {"type": kind, kind: self.from_manifest(part[kind])} | {k: v for k, v in part.items() if k != kind}

    def from_manifest(self, path: str) -> str:
        """A path as the manifest names it: relative to the manifest's folder where there is such a path."""
        if os.path.isabs(path):
            return _relative(Path(path), self.output.folder)
        return Path(os.path.normpath(os.path.join(self.to_source, path))).as_posix()


def _relative(path: Path, folder: Path) -> str:
    try:
        return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()
    except ValueError:  # another drive
        return path.resolve().as_posix()


def make(
    about: Dataset,
    rows: Rows,
    source: Path,
    output: Path,
    *,
    name: str | None = None,
    limit: int | None = None,
    **options: Any,
) -> Report:
    """Run a recipe: write ``<split>.jsonl``, ``dropped.jsonl``, ``missing.txt`` and ``recipe.json`` into ``output``.

    Args:
        name: the ``source`` of each row; the recipe's file name when None.
        limit: stop behind this many kept rows.
        options: the recipe's own; a recipe that writes media itself takes ``output``, the folder, as one of them.

    Raises:
        RecipeError: the source is not as it has to be, or no row was kept (``dropped.jsonl`` and ``missing.txt`` say
            why). LockedError: another run writes there.
        StoreError: ``output`` is a URL.
    """
    output = local_path(output)
    check_layout(about, source)
    lacking.cache_clear()
    name = name or Path(inspect.getfile(rows)).stem
    given = options | ({"output": output} if "output" in inspect.signature(rows).parameters else {})
    with ExitStack() as stack:
        maker = _Maker(about, name, source, Output(output, name, stack))
        bar = stack.enter_context(_progress())
        task = bar.add_task(name, total=None, kept=0, dropped=0)
        for item in rows(source, **given):
            maker.row(item) if isinstance(item, Row) else maker.drop(item)
            kept, dropped = maker.report.rows.total(), maker.report.dropped.total()
            bar.update(task, kept=kept, dropped=dropped)
            if limit is not None and kept >= limit:
                break
        if not maker.report.rows:
            maker.output.finish_empty()
            raise RecipeError(f"{source}: no row was kept{maker.why_not()}")
        maker.output.finish(account(about, name, rows, options | {"limit": limit}, maker.report))
    return maker.report


def account(about: Dataset, name: str, rows: Rows, options: dict[str, Any], report: Report) -> dict[str, Any]:
    """What ``recipe.json`` holds; nothing in it changes from one run to the next."""
    return {
        "recipe": name,
        "about": asdict(about),
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in options.items()},
        **report.to_dict(),
        "versions": {
            "avllm": __version__,
            "recipe_sha256": hashlib.sha256(Path(inspect.getfile(rows)).read_bytes()).hexdigest(),
        },
    }


def _progress() -> Progress:
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}: {task.fields[kept]:,} rows, {task.fields[dropped]:,} left out"),
    )
    return Progress(*columns, TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal)


def own_options(rows: Rows) -> list[inspect.Parameter]:
    """The parameters of ``rows`` behind the source, with their types; ``output`` is the frame's."""
    hints = get_type_hints(rows, include_extras=True)
    parameters = list(inspect.signature(rows).parameters.values())[1:]
    return [p.replace(annotation=hints.get(p.name, str), kind=p.KEYWORD_ONLY) for p in parameters if p.name != "output"]


def command(about: Dataset, rows: Rows) -> typer.Typer:
    """The command line of a recipe."""

    def run(
        source: Annotated[Path, typer.Argument(help="The data set's folder.")],
        *,
        output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the manifests.")],
        limit: Annotated[int | None, typer.Option(min=1, help="Stop behind this many rows.")] = None,
        allow_missing: Annotated[bool, typer.Option("--allow-missing", help="Missing media are no failure.")] = False,
        as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, as last line.")] = False,
        **options: Any,
    ) -> None:
        try:
            report = make(about, rows, source, output, limit=limit, **options)
        except (RecipeError, LockedError, StoreError) as error:
            raise _failed(str(error)) from error
        except OSError as error:  # a disk that is full, a folder that is not ours
            raise _failed(f"{error.filename or output}: {error.strerror or error}") from error
        except ValueError as error:  # of a reader, about what a file holds
            raise _failed(f"{source} -> {output}: {type(error).__name__}: {error}") from error
        _say(about, report, output, as_json)
        if report.missing_files and not allow_missing:
            raise _failed(
                f"{report.missing_files:,} media files are missing or empty; {output / 'missing.txt'} names them. "
                "The manifests hold the other rows. Get the files and run again, or add --allow-missing"
            )

    hints = get_type_hints(run, include_extras=True)
    fixed = [
        p.replace(annotation=hints[p.name])
        for p in inspect.signature(run).parameters.values()
        if p.kind != p.VAR_KEYWORD
    ]
    parameters = [*fixed[:2], *own_options(rows), *fixed[2:]]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    lines = "\n".join(line.strip() for line in about.layout.strip().splitlines())
    # \b keeps the lines of a paragraph in the help.
    run.__doc__ = f"{about.title}\n\nLicence: {about.licence}\n\nGet it: {about.where}\n\n\b\nExpected:\n{lines}"
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(run)
    return app


def _failed(why: str) -> typer.Exit:
    typer.echo(f"error: {why}", err=True)
    return typer.Exit(1)


def _say(about: Dataset, report: Report, output: Path, as_json: bool) -> None:
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
    """Run a recipe from the command line; ends the process with 1 when it failed or media files are missing."""
    set_up()
    command(about, rows)(sys.argv[1:] if argv is None else argv)
