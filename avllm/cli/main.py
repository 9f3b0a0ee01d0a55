"""Run the ``avllm`` command.

A command imports what it needs inside its function, so that ``avllm --help`` answers at once.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from avllm.cli.chat import chat
from avllm.cli.ckpt import ckpt
from avllm.cli.data import data
from avllm.cli.embed import embed
from avllm.cli.explain import config, parts
from avllm.cli.options import (
    AllowPart,
    AllowUrl,
    Backbone,
    Checkpoint,
    Decoding,
    Device,
    Json,
    Limit,
    LongestAnswer,
    MediaRoot,
    Output,
    Precision,
    Quantize,
    Sound,
    Strict,
    Temperature,
    TopP,
    Workers,
    check_sound,
    decoder_of,
    hush,
    load_chat,
    output_file,
    places_of,
    print_figures,
)
from avllm.errors import DEBUG, exit_on_user_error

app = typer.Typer(
    name="avllm",
    help="Make a language model see and hear: train, ask, evaluate; look at settings, data, parts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


def main() -> None:
    """Run a command; a user's mistake is one line and exit code 1, a bug is a traceback."""
    with exit_on_user_error():
        app()


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    if debug:
        os.environ[DEBUG] = "1"


@app.command()
def ask(
    checkpoint: Checkpoint,
    question: Annotated[str, typer.Argument(help="What you want to know.")],
    video: Annotated[
        list[Path] | None, typer.Option(help="A video file; may be given several times.")
    ] = None,
    audio: Annotated[
        list[Path] | None, typer.Option(help="A sound file, or a video whose sound is meant.")
    ] = None,
    image: Annotated[list[Path] | None, typer.Option(help="A picture.")] = None,
    sound: Sound = "auto",
    max_new_tokens: LongestAnswer = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    decoding: Decoding = None,
    device: Device = "cpu",
    quantize: Quantize = None,
    backbone: Backbone = None,
    allow_part: AllowPart = None,
    strict: Strict = False,
) -> None:
    """Ask about a clip; the answer streams to the terminal."""
    hush()
    check_sound(sound)
    generation = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "decoding": decoder_of(decoding),
    }
    asked = load_chat(checkpoint, device, quantize, backbone, allow_part, strict)
    pieces = asked.ask(question, video=video, audio=audio, image=image, sound=sound, **generation)
    for warning in asked.warnings:
        typer.echo(f"warning: {warning}", err=True)
    before = len(asked.warnings)
    answered = False
    for piece in pieces:
        typer.echo(piece, nl=False)
        sys.stdout.flush()
        answered = True
    typer.echo()
    for warning in asked.warnings[before:]:
        typer.echo(f"warning: {warning}", err=True)
    if not answered:
        typer.echo("(the model said nothing)", err=True)


AnsweredRows = Annotated[Path | None, typer.Argument(help="Rows with their answers (JSONL).")]
Benchmark = Annotated[
    str | None, typer.Option(help="Instead: a benchmark, see `avllm parts benchmarks`.")
]
BenchmarkData = Annotated[
    Path | None, typer.Option(help="What the benchmark reads, as its authors distribute it.")
]
Without = Annotated[list[str] | None, typer.Option(help="Ask again without audio, video or both.")]
Swap = Annotated[
    list[str] | None, typer.Option(help="Ask again with audio or video of another clip.")
]


LongestOfAll = Annotated[
    int | None, typer.Option(min=1, help="Longest answer; follows the references.")
]
Refusal = Annotated[str, typer.Option(help="The answer by which a question is refused.")]
Report = Annotated[
    Path | None, typer.Option(help="File for a page of figures and wrong answers (HTML).")
]
FeatureCache = Annotated[Path | None, typer.Option(help="Folder of features to use and to fill.")]


@app.command(name="eval")
def evaluate(
    checkpoint: Checkpoint,
    manifest: AnsweredRows = None,
    benchmark: Benchmark = None,
    data: BenchmarkData = None,
    option: Annotated[list[str] | None, typer.Option(help="Of the benchmark: key=value.")] = None,
    without: Without = None,
    swap: Swap = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows answered at a time.")] = 128,
    limit: Limit = None,
    seed: Annotated[int, typer.Option(help="Of --limit, exchanged clips and intervals.")] = 0,
    max_new_tokens: LongestOfAll = None,
    decoding: Decoding = None,
    refusal: Refusal = "unanswerable",
    num_workers: Workers = 0,
    cache: FeatureCache = None,
    precision: Precision = "fp32",
    device: Device = "cpu",
    quantize: Quantize = None,
    backbone: Backbone = None,
    media_root: MediaRoot = None,
    allow_url: AllowUrl = None,
    allow_part: AllowPart = None,
    output: Output = None,
    predictions: Annotated[Path | None, typer.Option(help="File for every answer (JSONL).")] = None,
    report: Report = None,
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Score generated answers by kind and source, also with streams removed or exchanged."""
    hush()
    from avllm.evaluation.command import result_console, run_eval

    output = output_file(output, manifest, predictions, report)
    figures = run_eval(
        checkpoint,
        manifest,
        benchmark=benchmark,
        data=data,
        options=option or [],
        without=without or [],
        swap=swap or [],
        limit=limit,
        refusal=refusal,
        predictions=predictions,
        report=report,
        tables=result_console(stderr=as_json),
        device=device,
        quantize=quantize,
        backbones=places_of(backbone),
        allow_parts=allow_part or (),
        strict=strict,
        batch_size=batch_size,
        seed=seed,
        max_new_tokens=max_new_tokens,
        decoding=decoder_of(decoding),
        num_workers=num_workers,
        cache=cache,
        precision=precision,
    )
    print_figures(figures, output, as_json)


@app.command()
def retrieve(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a stage-1 run.")],
    manifest: Annotated[Path, typer.Argument(help="Captions, one a row (JSONL).")],
    batch_size: Annotated[int, typer.Option(min=1, help="Rows embedded at a time.")] = 32,
    limit: Limit = None,
    seed: Annotated[int, typer.Option(help="Of --limit.")] = 0,
    num_workers: Workers = 0,
    precision: Precision = "fp32",
    device: Device = "cpu",
    backbone: Backbone = None,
    media_root: MediaRoot = None,
    allow_url: AllowUrl = None,
    allow_part: AllowPart = None,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Search clips by caption and captions by clip after stage 1: recall at 1, 5 and 10."""
    hush()
    from avllm.evaluation.command import result_console, run_retrieval

    output = output_file(output, manifest)
    figures = run_retrieval(
        checkpoint,
        manifest,
        limit=limit,
        tables=result_console(stderr=as_json),
        device=device,
        backbones=places_of(backbone),
        allow_parts=allow_part or (),
        batch_size=batch_size,
        seed=seed,
        num_workers=num_workers,
        precision=precision,
    )
    print_figures(figures, output, as_json)


@app.command()
def train(
    presets: Annotated[
        list[str],
        typer.Argument(
            metavar="PRESET... [KEY=VALUE...]",
            help="Presets, or folders of them, whose files train in the order of their names. "
            "key=value changes every stage, STAGE.key=value one.",
        ),
    ],
    only: Annotated[
        list[str] | None, typer.Option(help="Train this stage alone; may be repeated.")
    ] = None,
) -> None:
    """Train the stages of presets, one after the other; finished ones are passed over.

    It is one process. For several, launch the script of each stage, train/stage1_align.py and so
    on, with accelerate or torchrun.
    """
    from avllm.training.stage_script import read_presets

    for preset in read_presets(presets, only or ()):
        typer.echo(str(preset.train()))


app.command()(chat)
app.command()(config)
app.command()(embed)
app.command()(parts)
app.add_typer(ckpt, name="ckpt")
app.add_typer(data, name="data")
