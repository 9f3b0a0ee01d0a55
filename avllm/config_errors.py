"""Name the right key where a setting is wrong: turn pydantic's errors into one line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from avllm.errors import UserError
from avllm.registry import CHOSEN_IN, kinds, suggest
from avllm.yaml_files import lines_of, nearest


class ConfigError(UserError):
    """A setting that does not exist, or a value that it cannot have."""


class PresetPlaces:
    """Find the place of a setting: a line of a preset, or the command line.

    Args:
        path: the preset.
        overrides: ``section.key=value`` of the command line.
    """

    def __init__(self, path: str | Path, overrides: Sequence[str]) -> None:
        self.path = path
        self.given = {override.partition("=")[0] for override in overrides}
        self.lines: dict[str, int] | None = None

    def label(self, key: str, message: str) -> str:
        """Write a message about a setting with its place."""
        if nearest(key, self.given):
            return f"{self.path}: {message} [given on the command line]"
        if self.lines is None:
            self.lines = lines_of(Path(self.path))
        holder = nearest(key, self.lines)
        line = f" line {self.lines[holder]}" if holder else ""
        inner = sorted(given for given in self.given if given.startswith(f"{key}."))
        also = f" [{', '.join(inner)} given on the command line]" if inner else ""
        return f"{self.path}{line}: {message}{also}"

    @contextmanager
    def named(self) -> Iterator[None]:
        """Name the place in errors of the block that are about a setting.

        Raises:
            UserError: the block's.
        """
        try:
            yield
        except UserError as error:
            if error.setting:
                error.args = (self.label(error.setting, str(error)),)
            raise


def explain(error: ValidationError, places: PresetPlaces, settings: type[BaseModel]) -> str:
    """Say which key is wrong, where it lies, how it is wrong, and what would be right.

    Args:
        error: raised when ``settings`` were validated.
        places: of the settings.
        settings: the model of all settings.
    """
    lines = []
    for item in error.errors():
        key = _as_written(item["loc"], places.given)
        lines.append(places.label(key, _describe(item, key, settings)))
    return "; ".join(lines)


def _describe(item: Mapping[str, Any], key: str, settings: type[BaseModel]) -> str:
    """Describe one of pydantic's errors, without where the value comes from."""
    if item["type"] == "extra_forbidden":
        return f"unknown key {key}; {_right_key(item['loc'], settings)}"
    if item["type"] == "missing":
        return f"{key} is missing"
    problem = item["msg"].removeprefix("Value error, ")
    return f"{key}: {problem} (seen: {_short(item.get('input'))})"


def _as_written(place: tuple[int | str, ...], given: set[str]) -> str:
    """Return the dotted key; no list number if the user gave a section instead of a list."""
    key = ".".join(str(name) for name in place) or "preset"
    without_number = key.replace(".0.", ".", 1)
    return without_number if without_number in given else key


def _right_key(place: tuple[int | str, ...], settings: type[BaseModel]) -> str:
    """Suggest the right key: one of that name elsewhere, or the nearest beside it."""
    name = str(place[-1])
    kind = name if name in kinds() else f"{name}s"
    if kind in kinds():
        return f"{kind} are chosen in {CHOSEN_IN[kind]}"
    if name in ("lr", "learning_rate"):
        return "learning rates belong to trainable: [[regex, rate or null], ...]"
    elsewhere = [path for path in _paths(settings) if path.rpartition(".")[2] == name]
    if elsewhere:
        return f"it is {' or '.join(elsewhere)}"
    return suggest(name, _keys_at(place[:-1], settings))


def _paths(section: type[BaseModel], before: str = "") -> Iterator[str]:
    """Yield the dotted names of all keys (``train.batch_size``), those inside of lists too."""
    for name, field in section.model_fields.items():
        yield before + name
        for inner in sections_in(field.annotation):
            yield from _paths(inner, f"{before}{name}.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _keys_at(place: tuple[int | str, ...], settings: type[BaseModel]) -> list[str]:
    """Return the keys that may be given at a place of the settings."""
    section = settings
    for name in place:
        if name not in section.model_fields:
            continue
        for inner in sections_in(section.model_fields[name].annotation):
            section = inner
    return list(section.model_fields)


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the sections that a type holds, inside of unions and lists too."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    sections = []
    for argument in getattr(annotation, "__args__", ()):
        sections += sections_in(argument)
    return sections
