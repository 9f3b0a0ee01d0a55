"""Read settings from YAML files, and set ``section.key=value`` over them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from avllm.errors import looked_in, one_line

MOST_VALUES = 100_000
"""Of a text, aliases written out: nine lines of aliases can mean 10**9, or have no end."""


class _Loader(yaml.SafeLoader):
    """Read YAML as ``safe_load`` does, and refuse a key that is given twice: one would be lost."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)  # type: ignore[no-untyped-call]
        names: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in names:
                    seen = f"the key {key.value!r} is given twice"
                    raise yaml.composer.ComposerError(problem=seen, problem_mark=key.start_mark)
                names.add(key.value)
        return node

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None and _values(node, {}) > MOST_VALUES:
            raise yaml.composer.ComposerError(
                problem=f"it holds more than {MOST_VALUES:,} values, or itself, by its aliases",
                problem_mark=node.start_mark,
            )
        return node


def _values(node: yaml.Node, counts: dict[int, int]) -> int:
    """Return the number of values in a node, aliases written out; too large if it holds itself.

    Args:
        node: of a tree.
        counts: of nodes, by their Python id, filled on the way.
    """
    if id(node) in counts:
        return counts[id(node)]
    counts[id(node)] = MOST_VALUES + 1  # until it is known
    children: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        children = node.value
    elif isinstance(node, yaml.MappingNode):
        children = [child for pair in node.value for child in pair]
    counts[id(node)] = 1 + sum(_values(child, counts) for child in children)
    return counts[id(node)]


def parse_yaml(text: str) -> Any:
    """Return the value that a YAML text writes.

    Raises:
        yaml.YAMLError: no YAML, a key twice, too many values, or a value that its type refuses
            (``2024-13-45``).
    """
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader  # noqa: S506
    except (ValueError, LookupError, AttributeError, RecursionError) as error:
        raise yaml.YAMLError(one_line(error)) from error


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
        settings = parse_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise refusal(f"{path} is no YAML: {one_line(error)}") from error
    if not isinstance(settings, dict):
        raise refusal(f"{path} holds {type(settings).__name__}; expected a mapping of settings")
    return settings


def lines_of(path: Path) -> dict[str, int]:
    """Return the line, from 1, at which each key of a YAML file lies: ``train.max_steps``.

    An item of a list has its number as its key: ``model.connector.0.depth``.
    """
    lines: dict[str, int] = {}
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError):
        return lines
    _add_lines(root, (), lines)
    return lines


def _add_lines(node: yaml.Node | None, keys: tuple[str, ...], lines: dict[str, int]) -> None:
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
        new_value = parse_yaml(value)
    except yaml.YAMLError as error:
        raise refusal(f"override {text!r} is no YAML: {one_line(error)}") from error
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
    if not name.isdecimal() or int(name) >= len(node):
        seen = f"{name!r} is no place in a list of {len(node)}"
        raise refusal(f"override {text!r}: {seen}; expected 0 to {len(node) - 1}")
    return int(name)
