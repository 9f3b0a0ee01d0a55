"""Read settings from YAML files, and set ``section.key=value`` over them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from avllm.errors import looked_in

DEEPEST = 20  # levels of a preset; an anchor that holds itself has no end


def read_mapping(path: Path, what: str, refusal: type[Exception]) -> dict[str, Any]:
    """Read the keys and values of a YAML file.

    Args:
        path: the file.
        what: the kind of file that is expected, for the message.
        refusal: the class of error to raise.

    Raises:
        refusal: there is no such file, or it holds no YAML, or no mapping.
    """
    if not path.is_file():
        raise refusal(f"{path} is not a file; expected {what} (YAML){looked_in(path)}")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise refusal(f"{path} is no YAML: {error}") from error
    if not isinstance(settings, dict):
        raise refusal(f"{path} holds {type(settings).__name__}; expected a mapping of settings")
    return settings


def lines_of(path: Path) -> dict[str, int]:
    """Return the line, from 1, at which each key of a YAML file lies: ``train.max_steps``.

    An item of a list has its number as its key: ``model.connector.0.depth``.
    """
    lines: dict[str, int] = {}
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return lines
    _add_lines(root, (), lines)
    return lines


def _add_lines(node: yaml.Node | None, keys: tuple[str, ...], lines: dict[str, int]) -> None:
    if len(keys) == DEEPEST:
        return
    children: list[tuple[str, yaml.Node, yaml.Node]] = []  # key, where it begins, its value
    if isinstance(node, yaml.MappingNode):
        children = [(str(key.value), key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = [(str(number), value, value) for number, value in enumerate(node.value)]
    for key, begin, value in children:
        lines[".".join((*keys, key))] = begin.start_mark.line + 1
        _add_lines(value, (*keys, key), lines)


def nearest(key: str, keys: Collection[str]) -> str:
    """Return the longest of some dotted keys that is a key itself or holds it; "" without one."""
    pieces = key.split(".")
    for count in range(len(pieces), 0, -1):
        holder = ".".join(pieces[:count])
        if holder in keys:
            return holder
    return ""


def apply_override(data: dict[str, Any], text: str, refusal: type[Exception]) -> None:
    """Set one value of settings that were read.

    Args:
        data: the settings, changed in place.
        text: ``section.key=value``; the value is YAML, and a number is a position in a list.
        refusal: the class of error to raise.

    Raises:
        refusal: the text has another form, or its key leads to nothing.
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        expected = "expected section.key=value, for example train.max_steps=100"
        raise refusal(f"override {text!r}; {expected}")
    try:
        new_value = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise refusal(f"override {text!r}: {value!r} is no YAML: {error}") from error
    *parents, last = key.split(".")
    node: Any = data
    for name in parents:
        node = _descend(node, name, text, refusal)
    if isinstance(node, list):
        node[_position(node, last, text, refusal)] = new_value
    else:
        node[last] = new_value


def _descend(node: Any, name: str, text: str, refusal: type[Exception]) -> Any:
    if isinstance(node, list):
        return node[_position(node, name, text, refusal)]
    child = node.setdefault(name, {})
    if child is None:
        child = node[name] = {}
    if not isinstance(child, dict | list):
        raise refusal(f"override {text!r}: {name} is {child!r}, which has no keys")
    return child


def _position(node: list[Any], name: str, text: str, refusal: type[Exception]) -> int:
    if not name.isdigit() or int(name) >= len(node):
        seen = f"{name!r} is no place in a list of {len(node)}"
        raise refusal(f"override {text!r}: {seen}; expected 0 to {len(node) - 1}")
    return int(name)
