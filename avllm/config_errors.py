"""Name the right key where a setting is wrong: turn pydantic's errors into one line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ValidationError

from avllm.registry import suggest


def explain(error: ValidationError, given: set[str], settings: type[BaseModel]) -> str:
    """Say which key is wrong, how, and what would be right.

    Args:
        error: of ``settings``. given: the keys that the command line has set. settings: the whole of the settings.
    """
    lines = []
    for item in error.errors():
        where = _as_written(item["loc"], given)
        if item["type"] == "extra_forbidden":
            line = f"unknown key {where}; {_right_key(item['loc'], settings)}"
        elif item["type"] == "missing":
            line = f"{where} is missing"
        else:
            line = f"{where}: {item['msg'].removeprefix('Value error, ')} (seen: {_short(item.get('input'))})"
        lines.append(f"{line} [given on the command line]" if where in given else line)
    return "; ".join(lines)


def _as_written(place: tuple[int | str, ...], given: set[str]) -> str:
    """Return the dotted key. Where a section may be given in the place of a list of one, it has no number there."""
    key = ".".join(str(name) for name in place) or "preset"
    without_number = key.replace(".0.", ".", 1)
    return without_number if without_number in given else key


def _right_key(place: tuple[int | str, ...], settings: type[BaseModel]) -> str:
    """Suggest the right key: one of that name elsewhere, or the nearest beside it."""
    name = str(place[-1])
    if name in ("lr", "learning_rate"):
        return "learning rates belong to trainable: [[regex, rate or null], ...]"
    elsewhere = [path for path in _paths(settings) if path.rpartition(".")[2] == name]
    if elsewhere:
        return f"it is {' or '.join(elsewhere)}"
    return suggest(name, _keys_at(place[:-1], settings))


def _paths(section: type[BaseModel], before: str = "") -> Iterator[str]:
    """Yield the dotted names of all keys, ``train.batch_size``; a list's sections come under its name."""
    for name, field in section.model_fields.items():
        yield before + name
        for inner in _sections_in(field.annotation):
            yield from _paths(inner, f"{before}{name}.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _keys_at(place: tuple[int | str, ...], settings: type[BaseModel]) -> list[str]:
    """Return the keys that may be given at a place of the settings."""
    section = settings
    for name in place:
        for inner in _sections_in(section.model_fields[name].annotation) if name in section.model_fields else []:
            section = inner
    return list(section.model_fields)


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for arg in getattr(annotation, "__args__", ()) for section in _sections_in(arg)]
