"""Parts by name: the file's name is the key, so that adding a part is adding a file.

Listing a folder lists the choices and imports nothing. ``"my_pkg.my_module:MyAdapter"`` reaches a user's own class.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from contextlib import suppress
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError

from avllm.errors import UserError

_HOUSE = Path(__file__).parent
_KINDS = {
    "encoders": ("encoders", "Encoder"),
    "adapters": ("adapters", "Adapter"),
    "layouts": ("layouts", "Layout"),
    "time_codecs": ("time_codecs", "TimeCodec"),
    "fusions": ("fusions", "Fusion"),
    "selectors": ("data/selectors", "Selector"),
    "row_makers": ("data/row_makers", "RowMaker"),
    "decoders": ("decoders", "Decoder"),
    "objectives": ("objectives", "Objective"),
    "benchmarks": ("evaluation/benchmarks", "Benchmark"),
}


class UnknownPartError(UserError):
    """A part's name or one of its options is not known; the message names what is."""


def kinds() -> list[str]:
    """The kinds of parts that have a folder."""
    return list(_KINDS)


def choices(kind: str) -> list[str]:
    """Names of the parts of a kind, from the file names alone."""
    folder = _HOUSE / _KINDS[kind][0]
    return sorted(p.stem for p in folder.glob("*.py") if p.stem != "base" and not p.stem.startswith("_"))


def suggest(name: str, known: list[str]) -> str:
    """``did you mean 'x'? known: ...`` for error messages."""
    near = get_close_matches(name, known, n=1, cutoff=0.5)
    start = f"did you mean {near[0]!r}? " if near else ""
    return f"{start}known: {', '.join(sorted(known)) or 'none'}"


def load(kind: str, name: str) -> Any:
    """The class behind a name.

    Raises:
        UnknownPartError: no such file, or the class of ``pkg.module:Class`` is not of this kind.
    """
    folder, base_name = _KINDS[kind]
    package = "avllm." + folder.replace("/", ".")
    base = getattr(import_module(package + ".base"), base_name)
    if ":" in name:
        module_name, _, class_name = name.partition(":")
        try:
            part = getattr(import_module(module_name), class_name, None)
        except ModuleNotFoundError as error:
            if not f"{module_name}.".startswith(f"{error.name}."):  # the module is there, and imports what is not
                raise
            raise UnknownPartError(f"{name!r}: no module {error.name!r} is found; is it on PYTHONPATH?") from error
        if not (inspect.isclass(part) and issubclass(part, base)):
            raise UnknownPartError(f"{name!r} is {part!r}; expected a subclass of {base.__module__}.{base_name}")
        return part
    if name not in choices(kind):
        raise UnknownPartError(f"unknown {kind[:-1]} {name!r}; {suggest(name, choices(kind))}")
    module = import_module(f"{package}.{name}")
    found = [c for c in vars(module).values() if _is_part(c, module.__name__, base)]
    if len(found) != 1:
        names = [c.__name__ for c in found]
        raise UnknownPartError(f"{module.__name__} defines {names}; expected exactly one public {base_name}")
    return found[0]


def _is_part(value: Any, module: str, base: type) -> bool:
    is_own = inspect.isclass(value) and value.__module__ == module and not value.__name__.startswith("_")
    return is_own and issubclass(value, base)


def options(part: type) -> dict[str, inspect.Parameter]:
    """The keyword-only arguments of a part's constructor, inherited ones included: what its YAML section accepts."""
    found: dict[str, inspect.Parameter] = {}
    for cls in part.__mro__:
        if "__init__" not in vars(cls) or cls is object:
            continue
        parameters = inspect.signature(cls.__init__).parameters.values()  # type: ignore[misc]
        found = {p.name: p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY} | found
        if all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters):
            break  # this constructor hands no further options on
    return found


def check_options(part: type, given: Mapping[str, Any], where: str) -> None:
    """Refuse options that the part does not have, and values of another type than its constructor says.

    Raises:
        UnknownPartError: an unknown or a missing option; the message names those that there are. UserError: a value.
    """
    known = options(part)
    unknown = [name for name in given if name not in known]
    if unknown:
        raise UnknownPartError(f"{where} has no option {unknown[0]!r}; {suggest(unknown[0], list(known))}")
    missing = [n for n, p in known.items() if p.default is inspect.Parameter.empty and n not in given]
    if missing:
        raise UnknownPartError(f"{where} needs {', '.join(repr(m) for m in missing)}, which was not given")
    types = option_types(part)
    for name, value in given.items():
        try:
            expected = TypeAdapter(types[name])
        except PydanticSchemaGenerationError:
            continue  # a class of the part's own: its constructor knows
        try:
            expected.validate_python(value, strict=True)
        except ValidationError as error:
            if not _fits_as_written(expected, value):
                raise UserError(f"{where}: {name} is {value!r}; {error.errors()[0]['msg'].lower()}") from error


def _fits_as_written(expected: TypeAdapter[Any], value: Any) -> bool:
    """Whether a value is what files have in the place of a type: a list for a tuple, text for a path or an enum."""
    try:
        expected.validate_json(json.dumps(value), strict=True)
    except (ValidationError, TypeError):
        return False
    return True


def option_types(part: type) -> dict[str, Any]:
    """The annotation of each of :func:`options`; anything goes where there is none, or none that can be read here."""
    found: dict[str, Any] = dict.fromkeys(options(part), Any)
    for cls in reversed(part.__mro__[:-1]):
        if "__init__" in vars(cls):
            with suppress(NameError):  # a name that is imported for type checkers alone
                hints = get_type_hints(cls.__init__)  # type: ignore[misc]
                found |= {name: hint for name, hint in hints.items() if name in found}
    return found


def check(kind: str, spec: Mapping[str, Any]) -> Any:
    """The class behind ``{"type": name, **options}``, if there is one that has these options.

    Raises:
        UnknownPartError: unknown type or option, or a missing one. UserError: a value of another type.
    """
    if "type" not in spec:
        raise UnknownPartError(
            f"a part of {kind} is {dict(spec)}; expected a 'type'; known: {', '.join(choices(kind))}"
        )
    part = load(kind, spec["type"])
    check_options(part, options_of(spec), f"{kind[:-1]} {spec['type']!r}")
    return part


def options_of(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What stands in a part's section beside its type."""
    return {k: v for k, v in spec.items() if k != "type"}


def build(kind: str, spec: Mapping[str, Any], *args: Any) -> Any:
    """Make a part out of ``{"type": name, **options}``; ``args`` are what the toolkit itself hands every part.

    Raises:
        UnknownPartError: see :func:`check`. UserError: see :func:`make`.
    """
    return make(check(kind, spec), *args, **options_of(spec))


def make(part: type, *args: Any, **given: Any) -> Any:
    """Call a part's constructor.

    Raises:
        UserError: it raised a ValueError, which is about one of its options.
    """
    try:
        return part(*args, **given)
    except ValueError as error:
        raise UserError(str(error)) from error
