"""``avllm data``: check manifests before training. A command imports what it needs inside it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from avllm.cli.options import (
    AllowPart,
    AllowUrl,
    Backbone,
    Json,
    MediaRoot,
    output_folder,
    places_of,
    result_console,
)
from avllm.cli.reading import NO_LIMIT, Decode, chosen_processor, reading_of
from avllm.errors import UserError
from avllm.on_ray import Engine, Gpus

if TYPE_CHECKING:
    from rich.console import Console

    from avllm.data.schema import Sample
    from avllm.inference.shown import Shown

data = typer.Typer(help="Check, show and count what is trained on.", no_args_is_help=True)

Manifests = Annotated[list[Path], typer.Argument(help="Manifests (JSONL).")]
Preset = Annotated[
    Path | None,
    typer.Option(help="Read as the model of this preset would (its LLM is not loaded)."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="section.key=value for the preset, as in training; may be repeated."
    ),
]
Checkpoint = Annotated[Path | None, typer.Option(help="Read as the model in this folder would.")]
Tokenizer = Annotated[
    str | None, typer.Option(help="Count the text's tokens with this tokenizer (name or folder).")
]
MaxLength = Annotated[
    int | None, typer.Option(min=1, help="Longest row in tokens; the preset's, else 2048.")
]
Workers = Annotated[int, typer.Option(min=1, help="Processes that read files.")]
Timeout = Annotated[
    float, typer.Option(min=0.1, help="Seconds after which reading a file is given up.")
]
CPUS = os.cpu_count() or 1


@data.command()
def check(
    manifests: Manifests,
    output: Annotated[
        Path | None, typer.Option(help="Folder for report, page, quarantine list and journal.")
    ] = None,
    decode: Annotated[
        Decode,
        typer.Option(
            help="headers alone; sample: also what training reads; full: also every other packet."
        ),
    ] = "sample",
    against: Annotated[
        list[Path] | None,
        typer.Option(
            help="Test rows, which must not occur in training; of several files: "
            "--against a --against b."
        ),
    ] = None,
    preset: Preset = None,
    overrides: Overrides = None,
    checkpoint: Checkpoint = None,
    media_root: MediaRoot = None,
    allow_url: AllowUrl = None,
    allow_part: AllowPart = None,
    tokenizer: Tokenizer = None,
    max_length: MaxLength = None,
    workers: Workers = CPUS,
    timeout: Timeout = 60.0,
    licences: Annotated[
        bool, typer.Option("--licences", help="Warn of rows that name no licence.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 when there are errors.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Find what is wrong with manifests and their files before training does."""
    import json

    from avllm.data.check.run import check as run
    from avllm.data.check.tables import print_report

    output_folder(output)
    processor = chosen_processor(preset, overrides, checkpoint, allow_part)
    reading = reading_of(processor, tokenizer, max_length, timeout, workers, decode)
    report = run(
        manifests,
        options=reading.options,
        against=against or [],
        tokens=reading.tokens,
        output=output,
        licences=licences,
    )
    print_report(result_console(as_json), report, output, counted=reading.tokens is not None)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), ensure_ascii=False))
    if strict and report.count("error"):
        raise typer.Exit(1)


@data.command()
def show(
    manifest: Annotated[Path, typer.Argument(help="A manifest (JSONL).")],
    row: Annotated[int, typer.Option(min=0, help="Which row, counted from 0.")] = 0,
    identity: Annotated[str | None, typer.Option("--id", help="The row with this id.")] = None,
    preset: Preset = None,
    overrides: Overrides = None,
    checkpoint: Checkpoint = None,
    media_root: MediaRoot = None,
    allow_url: AllowUrl = None,
    allow_part: AllowPart = None,
    max_length: MaxLength = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for frames and spectrogram (PNG).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show a row as the model gets it: its media runs, and the trained text green or in [[ ]]."""
    import json

    from avllm.data.media.load import MediaError
    from avllm.data.schema import RowError
    from avllm.inference.shown import save_pictures
    from avllm.inference.shown import show as look

    output_folder(output)
    line, sample = _row(manifest, row, identity)
    processor = chosen_processor(preset, overrides, checkpoint, allow_part)
    if processor is None:
        raise UserError(
            "neither --preset nor --checkpoint is given; a row is shown as a model gets it, "
            "so name one",
            reason="no_model",
        )
    processor.max_length = max_length or processor.max_length
    try:
        shown = look(processor, sample, manifest.parent)
    except (MediaError, RowError) as error:
        raise UserError(
            f"{manifest} line {line}, row {sample.id!r}: {error.reason}: {error}",
            reason=error.reason,
        ) from error
    _print_row(shown, processor.max_length, result_console(as_json))
    pictures = [] if output is None else save_pictures(shown, output)
    for path in pictures:
        typer.echo(str(path), err=as_json)
    if as_json:
        row_as_json: dict[str, Any] = {
            "id": shown.sample.id,
            "tokens": len(shown.row.input_ids),
            "trained": shown.row.num_targets,
            "pieces": [[piece.kind, piece.text, piece.tokens] for piece in shown.pieces],
            "files": [str(path) for path in pictures],
        }
        typer.echo(json.dumps(row_as_json))


def _print_row(shown: Shown, max_length: int, console: Console) -> None:
    """Print a row's text, its sizes and its media."""
    if console.color_system is not None and not console.no_color:
        console.print(shown.text, soft_wrap=True, markup=False, highlight=False)
        mark = "green"
    else:
        console.print(shown.marked, soft_wrap=True, markup=False, highlight=False)
        mark = "in [[ ]]"
    console.print(
        f"\n{shown.sample.id}: {len(shown.row.input_ids)} tokens, "
        f"{shown.row.num_targets} trained on ({mark}), limit {max_length} (data.max_length)",
        markup=False,
        highlight=False,
    )
    for number, media in enumerate(shown.media):
        runs = " + ".join(f"{count} {stream}" for stream, count in media.tokens.items())
        console.print(
            f"media {number}: {media.part.path}, {media.duration:.2f} s: {runs} tokens",
            highlight=False,
        )


@data.command()
def stats(
    manifests: Manifests,
    probe: Annotated[
        bool, typer.Option("--probe", help="Open every file for the length of its clip.")
    ] = False,
    preset: Preset = None,
    overrides: Overrides = None,
    checkpoint: Checkpoint = None,
    media_root: MediaRoot = None,
    allow_url: AllowUrl = None,
    allow_part: AllowPart = None,
    tokenizer: Tokenizer = None,
    workers: Workers = CPUS,
    timeout: Timeout = 60.0,
    as_json: Json = False,
) -> None:
    """Count rows by manifest, source, kind and modality, with seconds and tokens."""
    import json

    from avllm.data.check.stats import stats as count
    from avllm.data.check.tables import print_stats

    processor = chosen_processor(preset, overrides, checkpoint, allow_part)
    decode: Decode = "headers"
    if processor is not None:  # the media tokens of a model follow from reading the files
        decode = "sample"
    reading = reading_of(processor, tokenizer, NO_LIMIT, timeout, workers, decode)
    opened = probe or processor is not None
    options = reading.options if opened else None
    counts = count(manifests, options=options, tokens=reading.tokens)
    print_stats(result_console(as_json), counts, opened=opened)
    if as_json:
        typer.echo(json.dumps(counts.to_dict(), ensure_ascii=False))


@data.command()
def mix(
    stage: Annotated[Path, typer.Argument(help="A preset (YAML).")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value, as in training.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes that will train together.")] = 1,
    as_json: Json = False,
) -> None:
    """Show what a stage draws of each source: rows, items, share of the run, effective epochs."""
    import json

    from avllm.config import load_config
    from avllm.data.check.tables import print_mixture
    from avllm.data.items import Items, read_quarantine
    from avllm.data.mixture import portions

    config = load_config(stage, overrides)
    items = Items(
        [source.manifest for source in config.data.train],
        pack=config.data.shares_media,
        max_packed=config.data.max_packed,
        quarantine=read_quarantine(config.data.quarantine),
    )
    sources = portions(config, items, processes)
    print_mixture(result_console(as_json), sources, config.data.temperature)
    if as_json:
        sources_as_json = [vars(portion) for portion in sources]
        typer.echo(json.dumps({"sources": sources_as_json}, ensure_ascii=False))


@data.command()
def pack(
    manifests: Manifests,
    output: Annotated[
        Path, typer.Option(help="Folder for the shards and the manifests that go with them.")
    ],
    shard_size: Annotated[
        str, typer.Option(help="Bytes that a shard does not pass: 500MB, 1GB, ...")
    ] = "1GB",
    media_root: MediaRoot = None,
    allow_url: AllowUrl = None,
    as_json: Json = False,
) -> None:
    """Pack manifests and their media into tar shards; training reads DIR/NAME.jsonl or its URL."""
    import json

    from avllm.data.store.shards import pack_shards, parse_size

    packed_manifests = pack_shards(manifests, output, parse_size(shard_size), media_root or ())
    for packed in packed_manifests:
        dropped = ", ".join(f"{count} {reason}" for reason, count in packed.dropped.items())
        size = f"{packed.size / 1e6:,.1f} MB in {packed.shards} shards"
        typer.echo(
            f"{packed.manifest}: {packed.rows:,} rows, {size}; left out: {dropped or 'none'}",
            err=as_json,
        )
    if as_json:
        packed_as_json = [
            vars(packed) | {"manifest": str(packed.manifest)} for packed in packed_manifests
        ]
        typer.echo(json.dumps({"packed": packed_as_json}))


@data.command()
def encode(
    stage: Annotated[Path, typer.Argument(help="A preset (YAML) with data.cache.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value, as in training.")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=0, help="Processes that decode, with Ray also encode; data.num_workers."),
    ] = None,
    engine: Engine = "local",
    gpus: Gpus = 0.0,
    processes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes that will train; they draw so many rows more. As many as here.",
        ),
    ] = None,
    backbone: Backbone = None,
    as_json: Json = False,
) -> None:
    """Fill a stage's feature cache before it trains (under torchrun: on all processes)."""
    import json

    from avllm.config import load_config
    from avllm.config_errors import PresetPlaces
    from avllm.log import hush_libraries, set_up

    overrides = [*(overrides or []), "train.trackers=[]"]
    config = load_config(stage, overrides)  # before anything heavy is imported
    hush_libraries()
    set_up()
    from avllm.training.accelerator import make_accelerator
    from avllm.training.features import encode_stage, summary

    if workers is not None:
        config.data.num_workers = workers
    config.backbones |= places_of(backbone)
    if config.data.cache is not None:
        output_folder(Path(config.data.cache))
    ray_workers = max(1, config.data.num_workers) if engine == "ray" else 0
    with PresetPlaces(stage, overrides).named():
        accelerator = make_accelerator(config, Path(config.output))
        filled = summary(encode_stage(config, accelerator, ray_workers, gpus, processes))
    if not accelerator.is_main_process:
        return
    typer.echo(
        f"{filled['folder']}: {filled['encoded']} of {filled['wanted']} clips encoded in "
        f"{filled['seconds']} s",
        err=as_json,
    )
    failed: Any = filled["failed"]
    for place, error in failed.items():
        typer.secho(f"left out {place}: {error}", fg="yellow", err=True)
    if as_json:
        typer.echo(json.dumps(filled))


def _row(manifest: Path, number: int, identity: str | None) -> tuple[int, Sample]:
    """Return the line and the sample with an id, or without one, with a number."""
    from avllm.data.manifest import iterate

    rows = 0
    for line, sample in iterate(manifest):
        if sample.id == identity or (identity is None and rows == number):
            return line, sample
        rows += 1
    searched = f"row {number}" if identity is None else f"row with id {identity!r}"
    raise UserError(f"{manifest} has {rows} rows and no {searched}", reason="no_row")
