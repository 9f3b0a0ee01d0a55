"""Options and outputs that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from avllm.inference.chat import Chat


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
Backbone = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PART=FOLDER",
        help="A backbone that lies elsewhere than the checkpoint says: llm=DIR, audio=DIR, ...",
    ),
]
Strict = Annotated[
    bool,
    typer.Option(
        "--strict", help="Refuse files that the model can use in part only: a video it only hears."
    ),
]
Sound = Annotated[str, typer.Option(help="The videos' own sound: auto, on or off.")]
LongestAnswer = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 = greedy: the same answer each time.")]
TopP = Annotated[
    float, typer.Option(min=0.01, max=1.0, help="Share of probability that is sampled from.")
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


def output_file(path: Path | None, *inputs: Path | None) -> Path | None:
    """Check a file that will be written, before anything is computed; see ``data.store``."""
    from avllm.data.store.output_path import output_file as check

    return None if path is None else check(path, inputs)


def output_folder(path: Path | None) -> Path | None:
    """Check a folder that files will be written to, before anything is computed."""
    from avllm.data.store.output_path import output_folder as check

    return None if path is None else check(path)


def places_of(backbone: list[str] | None) -> dict[str, str]:
    """Return the folders of backbones that ``--backbone`` names, by part."""
    from avllm.models.checkpoint_format import read_backbones

    return read_backbones(backbone or ())


def hush() -> None:
    """Keep libraries' notices off stderr; called before they are imported."""
    from avllm.log import hush_libraries

    hush_libraries()


def check_sound(sound: str) -> None:
    """Refuse a word of ``--sound`` before a model is loaded."""
    from avllm.inference.asked_files import check_sound as check

    check(sound)


def decoder_of(decoding: str | None) -> dict[str, Any] | None:
    """Return the decoder that ``--decoding`` names."""
    from avllm.inference.generation import read_decoding

    return read_decoding(decoding)


def load_chat(
    checkpoint: Path,
    device: str,
    quantize: str | None,
    backbone: list[str] | None,
    allow_part: list[str] | None,
    strict: bool,
) -> Chat:
    """Load a model by the options of a command."""
    from avllm.inference.chat import Chat

    return Chat.load(
        checkpoint,
        device=device,
        quantize=quantize,
        backbones=places_of(backbone),
        allow_parts=allow_part or (),
        strict=strict,
    )


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
