"""``avllm ckpt``: look at checkpoints. What a command needs is imported inside it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from avllm.cli.options import Json

ckpt = typer.Typer(help="Look at checkpoints.", no_args_is_help=True)


@ckpt.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="Folder of a checkpoint.")],
    as_json: Json = False,
) -> None:
    """Show what a checkpoint is made of: stages, backbones with hashes, parameters by part."""
    import json

    from avllm.evaluation.listing import inspect_checkpoint

    found = inspect_checkpoint(folder)
    fusion = f", fusion {found['fusion']}" if found["fusion"] else ""
    typer.echo(f"{folder}: {' -> '.join(found['connector'])}, layout {found['layout']}{fusion}")
    for number, stage in enumerate(found["stages"], start=1):
        typer.echo(
            f"stage {number}: {stage['stage']}, {stage.get('steps')} steps, data {', '.join(stage.get('data', {}))}"
        )
    for part, record in found["backbones"].items():
        state = {None: "not checked (hub)", True: "found, hash as recorded", False: "NOT as recorded"}[record["found"]]
        typer.echo(f"backbone {part}: {record['name']} {record['sha256'] or record['revision'] or ''}: {state}")
    for part, count in found["parameters"].items():
        typer.echo(f"parameters {part}: {count:,}")
    for file, value in found["sha256"].items():
        typer.echo(f"sha256 {file}: {value}")
    if as_json:
        typer.echo(json.dumps(found))
