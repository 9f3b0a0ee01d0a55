"""``avllm config`` and ``avllm parts``: explain settings, fields of rows and options of parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from avllm.cli.options import Json, hush

if TYPE_CHECKING:
    from avllm.reference.parts import PartReference
    from avllm.reference.settings import Setting


def config(
    key: Annotated[
        str | None,
        typer.Argument(
            help="train.max_steps, model.llm, data, ...; row or row.kind for the fields of a "
            "manifest's rows."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Explain the settings of a preset: all as a tree, a section, or one with its place.

    Without KEY, all are printed with type and default. With KEY, meaning, type, allowed values and
    default, and the preset with this key alone.
    """
    import json

    from avllm.reference.settings import find_setting, preset_settings

    settings = preset_settings() if key is None else (find_setting(key),)
    if key is not None:
        _print_setting(settings[0], as_json)
    else:
        for setting in settings:
            _print_tree(setting, 0, as_json)
    if as_json:
        typer.echo(json.dumps({"settings": [setting.to_dict() for setting in settings]}))


def _print_tree(setting: Setting, depth: int, to_stderr: bool) -> None:
    """Print a setting and, below it, those within it."""
    line = f"{'  ' * depth}{setting.name}: {setting.type}"
    if setting.allowed and not setting.kind:
        line += f", {setting.allowed}"
    if setting.default:
        line += " (required)" if setting.default == "required" else f" = {setting.default}"
    typer.echo(line, err=to_stderr)
    for inner in setting.inner:
        _print_tree(inner, depth + 1, to_stderr)


def _print_setting(setting: Setting, to_stderr: bool) -> None:
    """Print all about a setting, and the tree of what lies within it."""
    import yaml

    lines = [f"{setting.key}: {setting.about}", "", f"type:    {setting.type}"]
    if setting.allowed:
        lines.append(f"allowed: {setting.allowed}")
    if setting.default:
        lines.append(f"default: {setting.default}")
    if setting.kind:
        lines.append(f"options: avllm parts {setting.kind} NAME")
    if setting.example is not None:
        example = yaml.safe_dump(setting.example, sort_keys=False, allow_unicode=True)
        lines += ["", *[f"    {line}" for line in example.splitlines()]]
    typer.echo("\n".join(lines), err=to_stderr)
    if setting.inner:
        typer.echo("", err=to_stderr)
    for inner in setting.inner:
        _print_tree(inner, 0, to_stderr)


def parts(
    kind: Annotated[
        str | None, typer.Argument(help="adapters, decoders, encoders, fusions, layouts, ...")
    ] = None,
    name: Annotated[
        str | None,
        typer.Argument(help="One part, also pkg.module:Class: its documentation and options."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the parts that a model and its training can be made of, or explain one of them."""
    import json

    hush()
    from avllm.reference.parts import parts as list_parts

    listed = list_parts(kind, name)
    for part in listed:
        if name is None:
            typer.echo(f"{part.kind:<11} {part.name:<20} {part.about}", err=as_json)
        else:
            typer.echo(_text_of(part), err=as_json)
    if as_json:
        typer.echo(json.dumps({"parts": [part.to_dict() for part in listed]}, default=str))


def _text_of(part: PartReference) -> str:
    """Return all about a part, for the terminal."""
    lines = [f"{part.kind} {part.name}", "", part.doc, "", "options:"]
    for option in part.options:
        default = "(required)" if option.default == "required" else f"= {option.default}"
        lines.append(f"  {option.name}: {option.type} {default}")
        lines.append(f"      {option.about}")
    lines += ["", f"file:  {part.file}"]
    lines += [f"paper: {paper}" for paper in part.papers]
    lines += ["use:", *[f"    {line}" for line in part.example.splitlines()]]
    return "\n".join(lines)
