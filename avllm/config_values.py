"""Types of settings that several sections share: numbers, parts, lists."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict

EXPONENTIAL = re.compile(r"[+-]?[\d.]+[eE][+-]?\d+")
NAMES = ("type", "name", "text")  # options of parts whose texts are never numbers


class Section(BaseModel):
    """A section of settings; a key that it does not have is an error."""

    model_config = ConfigDict(extra="forbid")


def _number(value: Any) -> Any:
    """Return the number that a text like ``1e-4`` means; YAML 1.1 needs a dot to see a number."""
    if not isinstance(value, str) or not EXPONENTIAL.fullmatch(value):
        return value
    number = float(value)
    return int(number) if number.is_integer() else number


Number = Annotated[float, BeforeValidator(_number)]
Whole = Annotated[int, BeforeValidator(_number)]


def _numbers(value: Any) -> Any:
    """Convert each number in the options of a part, also inside of lists and sections."""
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    if not isinstance(value, dict):
        return _number(value)
    options = {}
    for option, content in value.items():
        options[option] = content if option in NAMES else _numbers(content)
    return options


PartSpec = Annotated[dict[str, Any], BeforeValidator(_numbers)]
"""``{"type": name, **options}``. The part itself checks its options, which are its arguments."""


def as_list(value: Any) -> Any:
    """Return a list unchanged, and a single value as a list of one."""
    if isinstance(value, list):
        return value
    return [value]
