"""Describe every setting of a preset and every field of a manifest's row, from their models."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from typing import Any, get_args

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from avllm.config import RunConfig
from avllm.config_errors import ConfigError, sections_in
from avllm.config_values import PartOf
from avllm.reference.types import limits, say_type, yaml_text

ROW = "row"
"""The key below which the fields of a manifest's row are described."""


@dataclass(frozen=True)
class Setting:
    """Describe one key.

    Attributes:
        key: dotted, ``data.train.manifest``; the number of an item in a list is left out.
        type: in words.
        allowed: limits or choices; "" where the type says all.
        default: as YAML, or ``required``.
        about: its meaning.
        example: the preset, or the row, with this key alone.
        kind: of parts, where the value names one.
        inner: keys of the section.
    """

    key: str
    type: str
    allowed: str
    default: str
    about: str
    example: Any = None
    kind: str = ""
    inner: tuple[Setting, ...] = field(default=())

    @property
    def name(self) -> str:
        """Return the last piece of the key."""
        return self.key.rpartition(".")[2]

    def walk(self) -> Iterator[Setting]:
        """Yield this setting and all within it, each before what it holds."""
        yield self
        for setting in self.inner:
            yield from setting.walk()

    def to_dict(self) -> dict[str, Any]:
        """Return the description, JSON-able."""
        return asdict(self)


def preset_settings() -> tuple[Setting, ...]:
    """Return the settings of a preset, in the order of a preset."""
    return _settings_of(RunConfig, "", ())


def row_fields() -> tuple[Setting, ...]:
    """Return the fields of a manifest's row; keys begin with ``row.``."""
    from avllm.data.schema import Sample

    return _settings_of(Sample, f"{ROW}.", ())


@dataclass(frozen=True)
class _Step:
    """One level on the way from the root to a key: its name, and what holds the next level."""

    name: str
    is_list: bool = False
    variant: str = ""  # the type of the part of content that the next level belongs to


def _settings_of(
    section: type[BaseModel], before: str, way: tuple[_Step, ...]
) -> tuple[Setting, ...]:
    """Return the settings of a section.

    Args:
        section: the model.
        before: put in front of the keys.
        way: from the root to the section.
    """
    settings = []
    for name, info in section.model_fields.items():
        if way and way[-1].variant and name == "type":
            continue  # the variant's name says it
        settings.append(_setting(name, info, before, way))
    return tuple(settings)


def _setting(name: str, info: FieldInfo, before: str, way: tuple[_Step, ...]) -> Setting:
    key = f"{before}{name}"
    inner_sections = sections_in(info.annotation)
    is_list = say_type(info.annotation).startswith("list of")
    inner: list[Setting] = []
    if len(inner_sections) == 1:
        inner += _settings_of(inner_sections[0], f"{key}.", (*way, _Step(name, is_list)))
    for variant in inner_sections if len(inner_sections) > 1 else ():
        inner.append(_variant(variant, key, (*way, _Step(name, is_list))))
    default = _default_of(info)
    placeholder = f"<{say_type(info.annotation)}>"
    value = placeholder if default in ("required", "null") else yaml.safe_load(default)
    return Setting(
        key=key,
        type=_type_of(info),
        allowed=", ".join(limits(info.annotation, info.metadata)),
        default=default,
        about=info.description or "",
        example=_example((*way, _Step(name)), value),
        kind=_kind_of(info),
        inner=tuple(inner),
    )


def _variant(part: type[BaseModel], key: str, way: tuple[_Step, ...]) -> Setting:
    """Describe one of several sections that may be given at a place, by its ``type``."""
    name = str(get_args(part.model_fields["type"].annotation)[0])
    about = (inspect.getdoc(part) or "").partition("\n")[0]
    last = _Step(way[-1].name, way[-1].is_list, variant=name)
    below = (*way[:-1], last)
    return Setting(
        key=f"{key}.{name}",
        type=f"section with type: {name}",
        allowed="",
        default="required",
        about=about,
        example=_example(below, None),
        inner=_settings_of(part, f"{key}.{name}.", below),
    )


def _type_of(info: FieldInfo) -> str:
    for mark in info.metadata:
        if isinstance(mark, PartOf):
            return f"part ({mark.kind})"
    return say_type(info.annotation)


def _kind_of(info: FieldInfo) -> str:
    """Return the kind of parts that a setting names, "" for none."""
    words = _type_of(info).partition("part (")[2]
    return words.partition(")")[0]


def _default_of(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    default = info.get_default(call_default_factory=True)
    if isinstance(default, BaseModel):
        default = default.model_dump(exclude_none=True)
    return yaml_text(default)


def _example(way: tuple[_Step, ...], value: Any) -> Any:
    """Return a preset that holds this value alone, at the end of the way."""
    for step in reversed(way):
        if step.variant:
            value = {"type": step.variant, **(value or {})}
        if step.is_list:
            value = [value]
        value = {step.name: value}
    return value


def find_setting(key: str) -> Setting:
    """Return the setting of a key; numbers of list items may be in it.

    Raises:
        ConfigError: there is no such setting; the message names the nearest.
    """
    asked = ".".join(piece for piece in key.split(".") if not piece.isdigit())
    if asked == ROW:
        return Setting(ROW, "section", "", "", "a row of a manifest (JSONL)", inner=row_fields())
    roots = row_fields() if asked.startswith(f"{ROW}.") else preset_settings()
    settings = {setting.key: setting for root in roots for setting in root.walk()}
    if asked in settings:
        return settings[asked]
    for holder in settings.values():
        if holder.kind and asked.startswith(f"{holder.key}."):
            raise ConfigError(
                f"{key} is an option of a part; see `avllm parts {holder.kind} NAME`",
                reason="option_of_part",
            )
    name = asked.rpartition(".")[2]
    nearest = [other for other in settings if other.rpartition(".")[2] == name]
    nearest = nearest or get_close_matches(asked, settings, n=1, cutoff=0.5)
    hint = f"did you mean {' or '.join(nearest)}? " if nearest else ""
    raise ConfigError(
        f"there is no setting {key!r}; {hint}`avllm config` prints them all",
        reason="unknown_setting",
    )
