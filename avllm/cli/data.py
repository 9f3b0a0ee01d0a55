"""``avllm data``: look at manifests before training does. What a command needs is imported inside it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from avllm.cli.options import AllowPart
from avllm.errors import UserError
from avllm.on_ray import Engine, Gpus

if TYPE_CHECKING:
    from avllm.data.check.files import ExamineOptions
    from avllm.data.check.run import TokenCounter
    from avllm.data.schema import Sample
    from avllm.models.processing_avllm import AVProcessor

data = typer.Typer(help="Check, show and count what is trained on.", no_args_is_help=True)

Manifests = Annotated[list[Path], typer.Argument(help="Manifests (JSONL).")]
Preset = Annotated[Path | None, typer.Option(help="Read as the model of this preset would (its LLM is not loaded).")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="section.key=value for the preset, as in training; may be repeated.")
]
Checkpoint = Annotated[Path | None, typer.Option(help="Read as the model in this folder would.")]
Tokenizer = Annotated[str | None, typer.Option(help="Count the text's tokens with this tokenizer (name or folder).")]
MaxLength = Annotated[int | None, typer.Option(min=1, help="Longest row in tokens; the preset's, else 2048.")]
Workers = Annotated[int, typer.Option(min=1, help="Processes that read files.")]
Timeout = Annotated[float, typer.Option(min=0.1, help="Seconds after which reading a file is given up.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, as last line.")]
CPUS = os.cpu_count() or 1
NO_LIMIT = sys.maxsize  # tokens: for counting rows that training may find too long


@data.command()
def check(
    manifests: Manifests,
    output: Annotated[Path | None, typer.Option(help="Folder for report, page, quarantine list and journal.")] = None,
    decode: Annotated[
        Literal["headers", "sample", "full"],
        typer.Option(help="headers alone; sample: also what training reads; full: also every other packet."),
    ] = "sample",
    against: Annotated[
        list[Path] | None,
        typer.Option(help="Test rows, which must not occur in training; of several files: --against a --against b."),
    ] = None,
    preset: Preset = None,
    overrides: Overrides = None,
    checkpoint: Checkpoint = None,
    allow_part: AllowPart = None,
    tokenizer: Tokenizer = None,
    max_length: MaxLength = None,
    workers: Workers = CPUS,
    timeout: Timeout = 60.0,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 when there are errors.")] = False,
    as_json: Json = False,
) -> None:
    """Find what is wrong with manifests and their files before training does."""
    import json

    from avllm.data.check.run import check as run
    from avllm.data.check.tables import print_report

    options, tokens = _examine_options(
        _processor(preset, overrides, checkpoint, allow_part), tokenizer, max_length, timeout, workers, decode
    )
    report = run(manifests, options=options, against=against or [], tokens=tokens, output=output)
    print_report(report, output, counted=tokens is not None)
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
    allow_part: AllowPart = None,
    max_length: MaxLength = None,
    output: Annotated[Path | None, typer.Option(help="Folder for frames and spectrogram (PNG).")] = None,
    as_json: Json = False,
) -> None:
    """Show a row as the model gets it: the chat with its media runs, and what is trained on: green, or in [[ ]]."""
    import json

    from rich.console import Console

    from avllm.data.media.load import MediaError
    from avllm.data.schema import RowError
    from avllm.inference.shown import save_pictures
    from avllm.inference.shown import show as look

    processor = _processor(preset, overrides, checkpoint, allow_part)
    if processor is None:
        raise UserError("neither --preset nor --checkpoint is given; a row is shown as a model gets it, so name one")
    processor.max_length = max_length or processor.max_length
    line, sample = _row(manifest, row, identity)
    try:
        shown = look(processor, sample, manifest.parent)
    except (MediaError, RowError) as error:
        raise UserError(f"{manifest} line {line}, row {sample.id!r}: {error.reason}: {error}") from error
    console = Console()
    colours = console.color_system is not None and not console.no_color
    console.print(shown.text if colours else shown.marked, soft_wrap=True, markup=False, highlight=False)
    console.print(
        f"\n{shown.sample.id}: {len(shown.row.input_ids)} tokens, {shown.row.num_targets} trained on "
        f"({'green' if colours else 'in [[ ]]'}), longest row {processor.max_length}",
        markup=False,
        highlight=False,
    )
    for number, media in enumerate(shown.media):
        runs = " + ".join(f"{count} {stream}" for stream, count in media.tokens.items())
        console.print(f"media {number}: {media.part.path}, {media.duration:.2f} s: {runs} tokens", highlight=False)
    written = [] if output is None else save_pictures(shown, output)
    for path in written:
        typer.echo(str(path))
    if as_json:
        counts: dict[str, Any] = {"tokens": len(shown.row.input_ids), "trained": shown.row.num_targets}
        counts["pieces"] = [[piece.kind, piece.text, piece.tokens] for piece in shown.pieces]
        typer.echo(json.dumps({"id": shown.sample.id, **counts, "files": [str(p) for p in written]}))


@data.command()
def stats(
    manifests: Manifests,
    probe: Annotated[bool, typer.Option("--probe", help="Open every file for the length of its clip.")] = False,
    preset: Preset = None,
    overrides: Overrides = None,
    checkpoint: Checkpoint = None,
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

    model = preset is not None or checkpoint is not None  # a model's media tokens are known when files were read
    decode: Literal["headers", "sample"] = "sample" if model else "headers"
    options, tokens = _examine_options(
        _processor(preset, overrides, checkpoint, allow_part), tokenizer, NO_LIMIT, timeout, workers, decode
    )
    found = count(manifests, options=options if probe or model else None, tokens=tokens)
    print_stats(found, opened=probe or model)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), ensure_ascii=False))


@data.command()
def mix(
    stage: Annotated[Path, typer.Argument(help="A preset (YAML).")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, as in training.")] = None,
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
    given = config.data
    manifests = [source.manifest for source in given.train]
    quarantine = read_quarantine(given.quarantine)
    items = Items(manifests, pack=given.shares_media, max_packed=given.max_packed, quarantine=quarantine)
    found = portions(config, items, processes)
    print_mixture(found, given.temperature)
    if as_json:
        typer.echo(json.dumps({"sources": [vars(portion) for portion in found]}, ensure_ascii=False))


@data.command()
def pack(
    manifests: Manifests,
    output: Annotated[Path, typer.Option(help="Folder for the shards and the manifests that go with them.")],
    shard_size: Annotated[str, typer.Option(help="Bytes that a shard does not pass: 500MB, 1GB, ...")] = "1GB",
    as_json: Json = False,
) -> None:
    """Put manifests and their media into tar shards (as WebDataset does); training reads DIR/NAME.jsonl or its URL."""
    import json

    from avllm.data.store.shards import pack_shards, parse_size

    found = pack_shards(manifests, output, parse_size(shard_size))
    for packed in found:
        dropped = ", ".join(f"{count} {reason}" for reason, count in packed.dropped.items()) or "none"
        size = f"{packed.size / 1e6:,.1f} MB in {packed.shards} shards"
        typer.echo(f"{packed.manifest}: {packed.rows:,} rows, {size}; left out: {dropped}")
    if as_json:
        typer.echo(json.dumps({"packed": [{**vars(p), "manifest": str(p.manifest)} for p in found]}))


@data.command()
def encode(
    stage: Annotated[Path, typer.Argument(help="A preset (YAML) with data.cache.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, as in training.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that decode, with Ray also encode; data.num_workers.")
    ] = None,
    engine: Engine = "local",
    gpus: Gpus = 0.0,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Processes that will train; they draw so many rows more. As many as here.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Fill a stage's feature cache before it trains (under torchrun: on several processes; or on Ray)."""
    import json

    from avllm.config import load_config
    from avllm.log import hush_libraries, set_up

    hush_libraries()
    set_up()
    from avllm.training.accelerator import make_accelerator
    from avllm.training.features import encode_stage, summary

    config = load_config(stage, [*(overrides or []), "train.trackers=[]"])
    config.data.num_workers = config.data.num_workers if workers is None else workers
    accelerator = make_accelerator(config, Path(config.output))
    ray_workers = max(1, config.data.num_workers) if engine == "ray" else 0
    found = summary(encode_stage(config, accelerator, ray_workers, gpus, processes))
    if not accelerator.is_main_process:
        return
    typer.echo(f"{found['folder']}: {found['encoded']} of {found['wanted']} clips encoded in {found['seconds']} s")
    failed: Any = found["failed"]
    for place, error in failed.items():
        typer.secho(f"left out {place}: {error}", fg="yellow", err=True)
    if as_json:
        typer.echo(json.dumps(found))


def _processor(
    preset: Path | None, overrides: list[str] | None, checkpoint: Path | None, allow_part: list[str] | None
) -> AVProcessor | None:
    """The processor that rows are read with; None when neither is given."""
    if preset is not None and checkpoint is not None:
        raise UserError("both --preset and --checkpoint are given; expected one of the two")
    if overrides and preset is None:
        raise UserError(f"--set {overrides[0]} changes a preset, and no --preset is given; name one, or leave it out")
    if preset is None and checkpoint is None:
        return None
    from avllm.log import hush_libraries

    hush_libraries()
    if checkpoint is not None:
        from avllm.models.processing_avllm import AVProcessor

        return AVProcessor.from_pretrained(checkpoint, allow_parts=allow_part or ())
    assert preset is not None
    from avllm.config import load_config
    from avllm.models.building.described import stage_processor

    return stage_processor(load_config(preset, overrides))


def _examine_options(
    processor: AVProcessor | None,
    tokenizer: str | None,
    max_length: int | None,
    timeout: float,
    workers: int,
    decode: Literal["headers", "sample", "full"],
) -> tuple[ExamineOptions, TokenCounter | None]:
    """Return how files are read and tokens counted: as a model does, or without one."""
    from avllm.data.check.files import ExamineOptions
    from avllm.data.check.uses import PlainReader

    if processor is None:
        if tokenizer is None and max_length not in (None, NO_LIMIT):
            raise UserError(
                f"--max-length {max_length} is given, and nothing that counts tokens; expected --preset, --checkpoint "
                "or --tokenizer beside it"
            )
        tokens = None if tokenizer is None else _text_tokens(tokenizer, max_length or 2048)
        return ExamineOptions(decode, PlainReader(timeout=timeout), workers=workers), tokens
    if tokenizer is not None:
        raise UserError("--tokenizer is given beside a model, which has its own; leave it out")
    if decode == "headers":
        raise UserError(
            "--decode headers is given beside a model, but headers do not say how many tokens a file becomes: rows "
            "that are too long would pass. Take --decode sample, or leave the model out"
        )
    from avllm.inference.row_tokens import ProcessorTokens, reading

    processor.timeout, processor.max_length = timeout, max_length or processor.max_length
    return ExamineOptions(decode, processor, reading(processor), workers), ProcessorTokens(processor)


def _text_tokens(name: str, max_length: int) -> TokenCounter:
    from transformers import AutoTokenizer

    from avllm.inference.row_tokens import TextTokens

    return TextTokens(AutoTokenizer.from_pretrained(name, trust_remote_code=False), max_length)


def _row(manifest: Path, number: int, identity: str | None) -> tuple[int, Sample]:
    """The row of a manifest with an id, or with a number, after its line."""
    from avllm.data.manifest import iterate

    count = 0
    for place, (line, sample) in enumerate(iterate(manifest)):
        if sample.id == identity if identity is not None else place == number:
            return line, sample
        count = place + 1
    wanted = f"row {number}" if identity is None else f"row with id {identity!r}"
    raise UserError(f"{manifest} has {count} rows and no {wanted}")
