"""Describe parts: options with type, default and meaning, papers, and how a preset names them."""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from avllm.reference.types import limits, say_type, yaml_text
from avllm.registry import (
    CHOSEN_IN,
    UnknownPartError,
    choices,
    kinds,
    load,
    option_types,
    options,
    suggest,
)

PAPER = re.compile(r"arXiv[: ]+\d{4}\.\d{4,5}|https?://[^\s)>\"]+[^\s)>\".,;]")
AS_IN = re.compile(r"as in (?:the objective )?`(?P<part>\w+)`(?P<rest>.*)")
ROLE = re.compile(r":\w+:`~?(?:[\w.]+\.)?(\w+)`")
ENTRY = re.compile(r"(?P<names>\w+(?:, \w+)*): (?P<text>.*)")
REQUIRED = "required"


@dataclass(frozen=True)
class PartOption:
    """Describe an option of a part: its type, default (YAML or ``required``) and meaning."""

    name: str
    type: str
    default: str
    about: str


FROM_OUTSIDE: dict[str, tuple[PartOption, ...]] = {
    "encoders": (
        PartOption("name", "text", "null", "hub name or folder of the pretrained model"),
        PartOption("revision", "text or null", "null", "commit, branch or tag on the hub"),
        PartOption(
            "dtype",
            "one of float32, bfloat16, float16 or null",
            "null",
            "of the weights in memory; those of the files",
        ),
        PartOption(
            "medium",
            "one of video, audio or null",
            "null",
            "of a stream that is not called video or audio",
        ),
    ),
    "objectives": (PartOption("weight", "number", "1.0", "share of the loss"),),
}
"""Options that the toolkit reads itself, by kind."""


@dataclass(frozen=True)
class PartReference:
    """Describe a part.

    Attributes:
        kind, name: as a preset names it.
        about: the first line of its documentation.
        doc: the documentation, without its list of arguments.
        options: those of the part, then those that the toolkit reads for all of its kind.
        file: in which it is written.
        papers: that its documentation cites.
        example: how to use it: YAML of a preset, or a command.
    """

    kind: str
    name: str
    about: str
    doc: str
    options: tuple[PartOption, ...]
    file: str
    papers: tuple[str, ...]
    example: str

    def to_dict(self) -> dict[str, Any]:
        """Return the description, JSON-able."""
        return asdict(self)


def parts(kind: str | None = None, name: str | None = None) -> list[PartReference]:
    """Describe the parts of a kind (or of all), or one part.

    Raises:
        UnknownPartError: no such kind or part; the nearest is named.
    """
    if kind is not None and kind not in kinds():
        raise UnknownPartError(
            f"unknown kind of parts {kind!r}; {suggest(kind, kinds())}", reason="unknown_kind"
        )
    described = []
    for listed in [kind] if kind else kinds():
        names = choices(listed) if name is None else [name]
        described += [describe(listed, part) for part in names]
    return described


def describe(kind: str, name: str) -> PartReference:
    """Describe a part of a kind by its name, a file's or ``pkg.module:Class``.

    Raises:
        UnknownPartError: there is no such part.
    """
    part = load(kind, name)
    doc = inspect.getdoc(part) or ""
    listed = _options_of(part)
    further = FROM_OUTSIDE.get(kind, ())
    if hasattr(part, "config_class"):
        further = (*further, *_config_options(part.config_class))
    module = sys.modules[part.__module__]
    cited = PAPER.findall(f"{module.__doc__ or ''}\n{doc}")
    return PartReference(
        kind=kind,
        name=name,
        about=plain(doc.partition("\n")[0]),
        doc=plain(_without_arguments(doc)),
        options=(*listed, *further),
        file=_short(Path(inspect.getfile(part))),
        papers=tuple(dict.fromkeys(" ".join(paper.split()) for paper in cited)),
        example=_example(kind, part, name, listed),
    )


def _options_of(part: type) -> tuple[PartOption, ...]:
    types = option_types(part)
    meanings = _meanings(part)
    listed = []
    for option, parameter in options(part).items():
        default = REQUIRED
        if parameter.default is not inspect.Parameter.empty:
            default = yaml_text(parameter.default)
        annotation = types[option]
        words = ", ".join([say_type(annotation), *limits(annotation)])
        listed.append(PartOption(option, words, default, meanings.get(option, "")))
    return tuple(listed)


def _config_options(config: type) -> tuple[PartOption, ...]:
    """Describe ``config`` of an encoder: its keys, where the class is of this package."""
    about = (
        "instead of name, for random weights, which then have to train: the fields of "
        f"{config.__module__.partition('.')[0]}'s {config.__name__}"
    )
    described = [PartOption("config", "mapping of text to anything", "null", about)]
    if not _is_own(config):
        return tuple(described)
    meanings = _meanings(config)
    for name, parameter in inspect.signature(config).parameters.items():
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            words = say_type(get_type_hints(config.__init__)[name])  # type: ignore[misc]
            default = yaml_text(parameter.default)
            described.append(PartOption(f"config.{name}", words, default, meanings.get(name, "")))
    return tuple(described)


def _is_own(config: type) -> bool:
    """Return whether a config is of this package: then there are no released weights."""
    return config.__module__.startswith("avllm.")


def _meanings(part: type) -> dict[str, str]:
    """Return the meaning of each argument, from the docstrings of the class and of its bases.

    A reference to another docstring is replaced by what is written there.
    """
    meanings: dict[str, str] = {}
    for cls in part.__mro__:
        doc = inspect.cleandoc(vars(cls).get("__doc__") or "")
        for name, text in arguments_of(doc).items():
            elsewhere = AS_IN.fullmatch(text)
            if elsewhere:
                there = _meanings(load("objectives", elsewhere["part"]))[name]
                text = there.rstrip(".") + elsewhere["rest"]
            if not text.startswith("see "):  # the base class, which follows, explains it
                meanings.setdefault(name, text)
    return meanings


def plain(text: str) -> str:
    """Return a docstring's text without the marks that are for the API reference."""
    return ROLE.sub(r"`\1`", text).replace("``", "`")


def arguments_of(doc: str) -> dict[str, str]:
    """Return the text of each argument in the ``Args:`` section of a docstring."""
    meanings: dict[str, str] = {}
    names: list[str] = []
    for line in _argument_lines(doc):
        entry = ENTRY.fullmatch(line.strip())
        if entry and line.startswith("    ") and not line.startswith("     "):
            names = entry["names"].split(", ")
            meanings |= dict.fromkeys(names, entry["text"])
        else:
            for name in names:
                meanings[name] += f" {line.strip()}"
    return {name: plain(text.strip()) for name, text in meanings.items()}


def _argument_lines(doc: str) -> list[str]:
    """Return the lines of the ``Args:`` section: those that are indented below its heading."""
    lines: list[str] = []
    for line in doc.partition("Args:\n")[2].splitlines():
        if line.strip() and not line.startswith(" "):
            break
        lines.append(line)
    return lines


def _without_arguments(doc: str) -> str:
    """Return a docstring without its ``Args:`` section."""
    before, heading, _ = doc.partition("Args:\n")
    listed = "\n".join(_argument_lines(doc))
    after = doc.removeprefix(before + heading + listed)
    return f"{before.strip()}\n\n{after.strip()}".strip()


def _short(path: Path) -> str:
    """Return a file of the package as ``avllm/...``, another one in full."""
    package = Path(__file__).parents[1]
    if path.is_relative_to(package):
        return path.relative_to(package.parent).as_posix()
    return str(path)


def _example(kind: str, part: Any, name: str, listed: tuple[PartOption, ...]) -> str:
    """Return how to use a part, with its options at their defaults."""
    spec: dict[str, Any] = {"type": name}
    if kind == "encoders" and hasattr(part, "config_class") and _is_own(part.config_class):
        spec["config"] = {}
    elif kind == "encoders":
        spec["name"] = "HUB_NAME_OR_FOLDER"
    for option in listed:
        if option.default == REQUIRED:
            spec[option.name] = _sample_value(option.name, option.type)
        elif option.default != "null":
            spec[option.name] = yaml.safe_load(option.default)
    if kind == "decoders":
        return f"avllm ask CHECKPOINT QUESTION --video clip.mp4 --decoding '{yaml_text(spec)}'"
    if kind == "benchmarks":
        return f"avllm eval CHECKPOINT --benchmark {name} --data FOLDER"
    if kind == "importers":
        files = " ".join(f"--{option.name} FILE" for option in listed)
        return f"avllm ckpt import {name} {files} --llm FOLDER --output FOLDER"
    holders = CHOSEN_IN[kind].split(".")
    value: Any = spec
    if kind == "encoders":
        value = {part.medium: spec}
    elif kind in ("adapters", "objectives"):
        value = [spec]
    for holder in reversed(holders):
        value = {holder: value}
    return yaml.safe_dump(value, default_flow_style=None, width=10_000, sort_keys=False).strip()


def _sample_value(name: str, words: str) -> Any:
    """Return a value of a required option.

    Args:
        name: of the option.
        words: its type, see :func:`~avllm.reference.types.say_type`.
    """
    if words.startswith("mapping of "):
        key, _, value = words.removeprefix("mapping of ").partition(" to ")
        return {_sample_value("stream", key): _sample_value(name, value)}
    if words.startswith("list of text"):
        return ["video", "audio"]
    if words.startswith("list of "):
        return [_sample_value(name, words.removeprefix("list of "))]
    if words.startswith(("whole number", "number")):
        return 1
    return "video" if "stream" in name else name.upper()
