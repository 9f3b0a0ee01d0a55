"""``avllm ckpt``: show what checkpoints hold. A command imports what it needs inside it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from avllm.cli.options import AllowPart, Json

ckpt = typer.Typer(help="Look at checkpoints.", no_args_is_help=True)

BACKBONE_STATES = {
    None: "not checked (hub)",
    True: "found, hash as recorded",
    False: "NOT as recorded",
}
"""By the ``found`` of a recorded backbone."""


@ckpt.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="Folder of a checkpoint.")],
    as_json: Json = False,
) -> None:
    """Show what a checkpoint is made of: stages, backbones with hashes, parameters by part."""
    import json

    from avllm.evaluation.listing import inspect_checkpoint

    contents = inspect_checkpoint(folder)
    parts = [" -> ".join(contents["connector"]), f"layout {contents['layout']}"]
    if contents["fusion"]:
        parts.append(f"fusion {contents['fusion']}")
    typer.echo(f"{folder}: {', '.join(parts)}", err=as_json)
    for number, stage in enumerate(contents["stages"], start=1):
        manifests = ", ".join(stage.get("data", {}))
        steps = stage.get("steps")
        typer.echo(
            f"stage {number}: {stage['stage']}, {steps} steps, data {manifests}", err=as_json
        )
    for part, backbone in contents["backbones"].items():
        version = backbone.get("sha256") or backbone.get("revision") or ""
        state = BACKBONE_STATES[backbone["found"]]
        typer.echo(f"backbone {part}: {backbone.get('name')} {version}: {state}", err=as_json)
    for part, count in contents["parameters"].items():
        typer.echo(f"parameters {part}: {count:,}", err=as_json)
    for file, value in contents["sha256"].items():
        typer.echo(f"sha256 {file}: {value}", err=as_json)
    if as_json:
        typer.echo(json.dumps(contents))


@ckpt.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="Folder of a checkpoint.")],
    files_only: Annotated[
        bool, typer.Option("--files-only", help="Compare digests alone; do not load the model.")
    ] = False,
    accept: Annotated[
        bool, typer.Option("--accept", help="Record the files that are there as the right ones.")
    ] = False,
    allow_part: AllowPart = None,
    as_json: Json = False,
) -> None:
    """Compare a checkpoint with its manifest, then load it; exit with 1 if anything is wrong."""
    import json

    from avllm.log import hush_libraries

    hush_libraries()
    from avllm.evaluation.verification import verify_checkpoint

    verification = verify_checkpoint(
        folder, load=not files_only, accept=accept, allow_parts=allow_part or ()
    )
    for file in verification.files:
        typer.echo(f"file {file.name}: {file.state}", err=as_json)
    for part, state in verification.backbones.items():
        typer.echo(f"backbone {part}: {state}", err=as_json)
    if verification.load_error is not None:
        typer.echo(f"loading: {verification.load_error or 'model and processor load'}", err=as_json)
    typer.echo(
        f"{folder}: {'good' if verification.is_good else 'NOT as it was saved'}", err=as_json
    )
    if as_json:
        typer.echo(json.dumps(verification.to_dict()))
    if not verification.is_good:
        raise typer.Exit(1)
