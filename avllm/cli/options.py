"""Options and outputs that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from rich.console import Console


def _admit_roots(roots: list[Path] | None) -> list[Path] | None:
    """Restrict what rows may name, before the command runs."""
    from avllm.data.store.access import allow

    allow(roots=roots or ())
    return roots


def _admit_urls(urls: list[str] | None) -> list[str] | None:
    """Restrict which URLs rows may name, before the command runs."""
    from avllm.data.store.access import allow

    allow(urls=urls or ())
    return urls


MediaRoot = Annotated[
    list[Path] | None,
    typer.Option(callback=_admit_roots, help="Rows may name files below these folders alone."),
]
AllowUrl = Annotated[
    list[str] | None,
    typer.Option(callback=_admit_urls, help="Rows may name these URLs alone: https://host/path."),
]
Checkpoint = Annotated[Path, typer.Argument(help="Folder of a trained model.")]
AllowPart = Annotated[
    list[str] | None,
    typer.Option(
        help="pkg.module:Class from outside of avllm that the checkpoint may name: it is imported."
    ),
]
Quantize = Annotated[
    Literal["4bit", "8bit"] | None, typer.Option(help="Load the LLM in 4 or 8 bit.")
]
Decoding = Annotated[
    str | None, typer.Option(help="A decoder, as YAML: '{type: contrastive, alpha: 1}'.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that decode.")]
Limit = Annotated[
    int | None,
    typer.Option(min=1, help="At most so many rows, by seed, of each kind its share."),
]
Precision = Annotated[
    Literal["auto", "fp32", "bf16"], typer.Option(help="fp32, bf16 (autocast), or auto.")
]
Output = Annotated[Path | None, typer.Option(help="File for the figures as JSON.")]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout; tables go to stderr.")
]


def output_file(path: Path | None) -> Path | None:
    """Make the folder of a file that will be written, before anything is computed for it."""
    from avllm.data.store.storage import local_path

    if path is None:
        return None
    path = local_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def result_console(as_json: bool) -> Console:
    """Return where tables are printed: stdout, or stderr where stdout is for one JSON object."""
    from rich.console import Console

    return Console(stderr=as_json)


def print_figures(figures: dict[str, Any], output: Path | None, as_json: bool) -> None:
    """Write figures into a file, and print them as the last line, where that is asked for."""
    import json

    if output is not None:
        text = json.dumps(figures, indent=2, ensure_ascii=False)
        output.write_text(text + "\n", encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(figures, ensure_ascii=False))
