"""``avllm ckpt``: look at checkpoints and import them. A command imports what it needs inside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from avllm.cli.options import AllowPart, Backbone, Json, hush, output_folder, places_of

ckpt = typer.Typer(help="Look at checkpoints, and import them.", no_args_is_help=True)

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

    hush()
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
    golden: Annotated[
        Path | None,
        typer.Option(help="Arrays of the original (.npz) to compare an imported checkpoint with."),
    ] = None,
    tol: Annotated[
        float,
        typer.Option(min=0.0, help="Largest difference, relative to an array's largest value."),
    ] = 1e-4,
    backbone: Backbone = None,
    allow_part: AllowPart = None,
    as_json: Json = False,
) -> None:
    """Compare a checkpoint with its manifest, then load it; exit with 1 if anything is wrong."""
    import json

    hush()
    from avllm.evaluation.verification import verify_checkpoint

    verification = verify_checkpoint(
        folder,
        load=not files_only and golden is None,
        accept=accept,
        allow_parts=allow_part or (),
        backbones=places_of(backbone),
    )
    arrays = []
    if golden is not None and verification.is_good:
        from avllm.evaluation.golden import compare_golden

        places = places_of(backbone)
        arrays = compare_golden(folder, golden, tol, allow_part or (), places)
    for file in verification.files:
        typer.echo(f"file {file.name}: {file.state}", err=as_json)
    for part, state in verification.backbones.items():
        typer.echo(f"backbone {part}: {state}", err=as_json)
    if verification.load_error is not None:
        typer.echo(f"loading: {verification.load_error or 'model and processor load'}", err=as_json)
    for array in arrays:
        seen = "not computed by this checkpoint"
        if array.difference is not None:
            seen = f"{array.difference:.2e}" + ("" if array.is_good else f" ABOVE {tol:g}")
        typer.echo(f"array {array.name}: {seen}", err=as_json)
    is_same = all(array.is_good for array in arrays)
    state = "good" if is_same else "NOT what the original computes"
    if not verification.is_good:
        state = "NOT as it was saved"
    typer.echo(f"{folder}: {state}", err=as_json)
    if as_json:
        contents = verification.to_dict() | {"arrays": [array.to_dict() for array in arrays]}
        typer.echo(json.dumps(contents | {"is_good": verification.is_good and is_same}))
    if not verification.is_good or not is_same:
        raise typer.Exit(1)


@ckpt.command("import", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def import_published(
    context: typer.Context,
    importer: Annotated[
        str,
        typer.Argument(help="Whose files: see `avllm parts importers`, also for their options."),
    ],
    llm: Annotated[str, typer.Option(help="Folder or hub name of the language model.")],
    output: Annotated[Path, typer.Option(help="Folder of the checkpoint; it must not exist.")],
    dims: Annotated[
        Path | None, typer.Option(help="JSON file of numbers that no tensor shows.")
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(help="Regular expression of tensors that may be missing or left over."),
    ] = None,
) -> None:
    """Make a checkpoint out of the weights that another project publishes.

    The importer's files are further options: `avllm ckpt import video_llama --vl VL.pth ...`.
    """
    hush()
    from avllm.models.building.importing import import_checkpoint

    output_folder(output.parent)
    files = file_options(context.args)
    folder = import_checkpoint(
        importer, files, llm=llm, output=output, dims=dims, allow=allow or ()
    )
    typer.echo(f"{folder}: written; compare it with the original: avllm ckpt verify --golden")


def file_options(arguments: list[str]) -> dict[str, str]:
    """Return an importer's files from the rest of a command line: ``--name PATH``, ``--name=PATH``.

    Raises:
        UserError: an argument that is no option, or an option without a value or given twice.
    """
    from avllm.errors import UserError

    files: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        option, is_joined, value = rest.pop(0).partition("=")
        if not is_joined and rest:
            value = rest.pop(0)
        name = option.removeprefix("--").replace("-", "_")
        if not option.startswith("--") or not value or name in files:
            raise UserError(
                f"{option!r} in the importer's files; expected --NAME PATH, each once",
                reason="arguments",
            )
        files[name] = value
    return files
