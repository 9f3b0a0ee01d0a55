"""Types of settings that several sections share: numbers, parts, lists."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AllowInfNan, BaseModel, BeforeValidator, ConfigDict, GetCoreSchemaHandler
from pydantic_core import core_schema

from avllm.registry import choices, unknown_part

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


Number = Annotated[float, BeforeValidator(_number), AllowInfNan(False)]
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


@dataclass(frozen=True)
class PartOf:
    """Mark a part's section with its kind, and refuse a type that no file of the kind has.

    The options are checked later, against the part itself, which has to be imported for it.

    Attributes:
        kind: one of :func:`avllm.registry.kinds`.
    """

    kind: str

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def check(self, spec: dict[str, Any]) -> dict[str, Any]:
        """Return the section.

        Raises:
            ValueError: names the nearest type that exists.
        """
        name = spec.get("type")
        if isinstance(name, str) and ":" not in name and name not in choices(self.kind):
            raise ValueError(unknown_part(self.kind, name))
        return spec


EncoderSpec = Annotated[PartSpec, PartOf("encoders")]
AdapterSpec = Annotated[PartSpec, PartOf("adapters")]
LayoutSpec = Annotated[PartSpec, PartOf("layouts")]
TimeCodecSpec = Annotated[PartSpec, PartOf("time_codecs")]
FusionSpec = Annotated[PartSpec, PartOf("fusions")]
SelectorSpec = Annotated[PartSpec, PartOf("selectors")]
RowMakerSpec = Annotated[PartSpec, PartOf("row_makers")]
ObjectiveSpec = Annotated[PartSpec, PartOf("objectives")]


def as_list(value: Any) -> Any:
    """Return a list unchanged, and a single value as a list of one."""
    if isinstance(value, list):
        return value
    return [value]
