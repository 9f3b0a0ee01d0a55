"""Say types, limits and defaults in a user's words."""

from __future__ import annotations

import inspect
import types
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
import yaml
from pydantic import BaseModel, JsonValue

from avllm.config_values import PartOf
from avllm.registry import choices

PLAIN = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true or false",
    type(None): "null",
    Any: "anything",
    JsonValue: "anything",
    inspect.Parameter.empty: "anything",
}


def say_type(annotation: Any) -> str:
    """Return an annotation in words: ``list of text``, ``number or null``, ``section``."""
    if get_origin(annotation) is not None:
        return _say_generic(annotation)
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return "section"
    name = PLAIN.get(annotation) or getattr(annotation, "__name__", annotation)
    return str(name)


def _say_generic(annotation: Any) -> str:
    """Return a type with arguments in words."""
    origin = get_origin(annotation)
    arguments = get_args(annotation)
    if origin is Annotated:
        return _say_annotated(arguments)
    if origin is Literal:
        return "one of " + ", ".join(yaml_text(value) for value in arguments)
    inner = [say_type(argument) for argument in arguments]
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(inner))
    if origin is dict:
        return f"mapping of {inner[0]} to {inner[1]}"
    if origin is tuple and arguments[-1] is not Ellipsis:
        return f"[{', '.join(inner)}]"
    return f"list of {inner[0]}"


def _say_annotated(arguments: Sequence[Any]) -> str:
    for mark in arguments[1:]:
        if isinstance(mark, PartOf):
            return f"part ({mark.kind})"
    return say_type(arguments[0])


def limits(annotation: Any, marks: Sequence[Any] = ()) -> list[str]:
    """Return what limits a value, from marks of its field and within its type.

    Args:
        annotation: the type.
        marks: metadata of the field, which pydantic keeps beside the type.
    """
    said = []
    for mark in marks:
        said += _say_mark(mark)
    if get_origin(annotation) is Annotated:
        inner, *own = get_args(annotation)
        said += limits(inner, own)
    elif get_origin(annotation) is not Literal:
        for argument in get_args(annotation):
            said += limits(argument)
    return list(dict.fromkeys(said))


def _say_mark(mark: Any) -> list[str]:
    if isinstance(mark, PartOf):
        return [", ".join(choices(mark.kind)) + ", or pkg.module:Class"]
    if isinstance(mark, annotated_types.Gt):
        return [f"above {mark.gt}"]
    if isinstance(mark, annotated_types.Ge):
        return [f"at least {mark.ge}"]
    if isinstance(mark, annotated_types.Lt):
        return [f"below {mark.lt}"]
    if isinstance(mark, annotated_types.Le):
        return [f"at most {mark.le}"]
    if isinstance(mark, annotated_types.MinLen):
        return ["not empty"]
    pattern = getattr(mark, "pattern", None)
    return [f"matching {pattern}"] if pattern else []


def yaml_text(value: Any) -> str:
    """Write a value as YAML in one line."""
    if isinstance(value, tuple):
        value = list(value)
    try:
        text = yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False)
    except yaml.YAMLError:  # the default of a part's option may be any object
        return str(value)
    return text.removesuffix("...\n").strip()
