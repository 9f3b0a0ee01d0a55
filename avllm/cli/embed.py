"""The command ``avllm embed``: vectors of texts, sights and sounds, in one space."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from avllm.cli.options import (
    AllowPart,
    AllowUrl,
    Backbone,
    Checkpoint,
    Device,
    MediaRoot,
    Quantize,
    Strict,
    hush,
    load_chat,
)


def embed(
    checkpoint: Checkpoint,
    manifest: Annotated[Path, typer.Argument(help="Rows to embed (JSONL).")],
    output: Annotated[
        Path, typer.Option(help="File for the vectors (.npz); a .jsonl lies beside it.")
    ],
    pool: Annotated[
        Literal["last", "mean"], typer.Option(help="The last token's state, or the mean of all.")
    ] = "last",
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts embedded at a time.")] = 8,
    workers: Annotated[int, typer.Option(min=1, help="Threads that decode ahead.")] = 2,
    device: Device = "cpu",
    quantize: Quantize = None,
    backbone: Backbone = None,
    media_root: MediaRoot = None,
    allow_url: AllowUrl = None,
    allow_part: AllowPart = None,
    strict: Strict = False,
) -> None:
    """Embed the rows of a manifest: a vector each for text, sight, sound and both."""
    hush()
    from avllm.inference.embedding import embed_file

    def load() -> tuple[Any, Any]:
        chat = load_chat(checkpoint, device, quantize, backbone, allow_part, strict)
        return chat.model, chat.processor

    counts = embed_file(
        load,
        checkpoint,
        manifest,
        output,
        pool,
        batch_size=batch_size,
        workers=workers,
        loaded={"quantize": quantize, "strict": strict},
    )
    typer.echo(
        f"{output}: {counts.rows} rows, {counts.before} of them of an earlier run; "
        f"{counts.errors} could not be embedded"
    )
