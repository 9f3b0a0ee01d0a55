"""Find and build parts by name: the file's name is the key, so that adding a part is adding a file.

Listing a folder lists the choices and imports nothing. ``"my_pkg.my_module:MyAdapter"`` names a
class of the user.
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

_PACKAGE = Path(__file__).parent
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
    "importers": ("models/importing", "Importer"),
}
CHOSEN_IN = {
    "encoders": "model.encoders",
    "adapters": "model.connector",
    "layouts": "model.layout",
    "time_codecs": "model.time_codec",
    "fusions": "model.fusion",
    "selectors": "model.selector",
    "row_makers": "data.rows",
    "decoders": "--decoding of `avllm ask`, `avllm eval` and serve/batch_infer.py",
    "objectives": "objectives",
    "benchmarks": "--benchmark of `avllm eval`",
    "importers": "`avllm ckpt import`",
}
"""The setting, or the option of a command, that names a part of each kind."""


class UnknownPartError(UserError):
    """An unknown part, or an unknown or missing option; the message names those that exist.

    Reasons: ``no_type``, ``unknown_part``, ``no_module``, ``no_class``, ``wrong_class``,
    ``unknown_option``, ``missing_option``, ``signature``.
    """


def kinds() -> list[str]:
    """Return the kinds of parts that have a folder."""
    return list(_KINDS)


def choices(kind: str) -> list[str]:
    """Return the names of the parts of a kind, from the file names alone."""
    folder = _PACKAGE / _KINDS[kind][0]
    names = [path.stem for path in folder.glob("*.py")]
    return sorted(name for name in names if name != "base" and not name.startswith("_"))


def suggest(name: str, names: list[str]) -> str:
    """Write ``did you mean 'x'? known: ...`` for error messages."""
    nearest = get_close_matches(name, names, n=1, cutoff=0.5)
    nearest += [full for full in sorted(names) if name and full.startswith(name)]  # hop_length
    question = f"did you mean {nearest[0]!r}? " if nearest else ""
    return f"{question}known: {', '.join(sorted(names)) or 'none'}"


def unknown_part(kind: str, name: str) -> str:
    """Write that no part of a kind has this name, and which is the nearest."""
    return f"unknown {kind[:-1]} {name!r}; {suggest(name, choices(kind))}"


def load(kind: str, name: str) -> Any:
    """Import the class of a part.

    Args:
        kind: one of :func:`kinds`.
        name: a file's name, or ``pkg.module:Class``.

    Raises:
        UnknownPartError: no such file, or the class of ``pkg.module:Class`` is not of this kind.
    """
    folder, base_name = _KINDS[kind]
    package = "avllm." + folder.replace("/", ".")
    base = getattr(import_module(package + ".base"), base_name)
    if ":" in name:
        return load_class(name, base)
    if name not in choices(kind):
        raise UnknownPartError(unknown_part(kind, name), reason="unknown_part")
    module = import_module(f"{package}.{name}")
    parts = [value for value in vars(module).values() if _is_part(value, module.__name__, base)]
    if len(parts) != 1:
        names = [part.__name__ for part in parts]
        raise UnknownPartError(
            f"{module.__name__} defines {names}; expected exactly one public {base_name}",
            reason="wrong_class",
        )
    return parts[0]


def load_class(name: str, base: type) -> type:
    """Import the class ``pkg.module:Class``.

    Raises:
        UnknownPartError: no such module or class, or it is no subclass of ``base``.
    """
    module_name, _, class_name = name.partition(":")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module exists, and imports another that does not
        raise UnknownPartError(
            f"{name!r}: no module {error.name!r} is found; is it on PYTHONPATH?",
            reason="no_module",
        ) from error
    expected = f"expected a subclass of {base.__module__}.{base.__name__}"
    part = getattr(module, class_name, None)
    if part is None:
        fitting = [key for key, value in vars(module).items() if _is_part(value, module_name, base)]
        raise UnknownPartError(
            f"{name!r}: the module {module_name} ({module.__file__}) has no {class_name!r}; "
            f"{expected}; {suggest(class_name, fitting)}",
            reason="no_class",
        )
    if not (inspect.isclass(part) and issubclass(part, base)):
        raise UnknownPartError(f"{name!r} is {part!r}; {expected}", reason="wrong_class")
    return part


def _is_part(value: Any, module: str, base: type) -> bool:
    """Return True for a public subclass of ``base`` that the module itself defines."""
    if not inspect.isclass(value) or value.__module__ != module:
        return False
    return issubclass(value, base) and not value.__name__.startswith("_")


def options(part: type) -> dict[str, inspect.Parameter]:
    """Return the options of a part, which its YAML section accepts.

    They are the keyword-only arguments of its constructor, and those of the base classes' if it
    passes further keywords on.
    """
    parameters: dict[str, inspect.Parameter] = {}
    for cls in part.__mro__:
        if "__init__" not in vars(cls) or cls is object:
            continue
        signature = inspect.signature(cls.__init__)  # type: ignore[misc]
        passes_on = False
        inherited: dict[str, inspect.Parameter] = {}
        for parameter in signature.parameters.values():
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                inherited[parameter.name] = parameter
            passes_on |= parameter.kind is inspect.Parameter.VAR_KEYWORD
        parameters = inherited | parameters
        if not passes_on:
            break
    return parameters


def check_options(part: type, given: Mapping[str, Any], where: str) -> None:
    """Refuse options that the part does not have, and values of the wrong type.

    Args:
        part: the class.
        given: option values by name.
        where: names the part in messages, ``adapter 'mlp'``.

    Raises:
        UnknownPartError: an unknown or a missing option; the message names those that exist.
        UserError: a value of another type.
    """
    parameters = options(part)
    for name in given:
        if name not in parameters:
            raise _unknown_option(part, name, list(parameters), where)
    missing = []
    for name, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and name not in given:
            missing.append(repr(name))
    if missing:
        raise UnknownPartError(
            f"{where} needs {', '.join(missing)}, which was not given",
            reason="missing_option",
        )
    _check_values(option_types(part), given, where)


def _unknown_option(part: type, name: str, names: list[str], where: str) -> UnknownPartError:
    """Return the error of an option that a part does not have, or not by keyword."""
    if name in inspect.signature(part.__init__).parameters:  # type: ignore[misc]
        return UnknownPartError(
            f"{where}: {name!r} is no option, since {part.__name__}.__init__ takes it by position "
            f"too; options are keyword-only: write them after a `*`, as in "
            f"def __init__(self, ..., *, {name})",
            reason="signature",
        )
    return UnknownPartError(
        f"{where} has no option {name!r}; {suggest(name, names)}", reason="unknown_option"
    )


def _check_values(types: Mapping[str, Any], given: Mapping[str, Any], where: str) -> None:
    """Refuse values that are not of their option's type."""
    for name, value in given.items():
        try:
            expected = TypeAdapter(types[name])
        except PydanticSchemaGenerationError:
            continue  # a class that the part defines: its constructor checks the value
        try:
            expected.validate_python(value, strict=True)
        except ValidationError as error:
            if not _fits_as_written(expected, value):
                expected_type = error.errors()[0]["msg"].lower()
                raise UserError(
                    f"{where}: {name} is {value!r}; {expected_type}",
                    reason="option_type",
                ) from error


def _fits_as_written(expected: TypeAdapter[Any], value: Any) -> bool:
    """Return True for values as files hold them: a list for a tuple, text for a path or an enum."""
    try:
        expected.validate_json(json.dumps(value), strict=True)
    except (ValidationError, TypeError):
        return False
    return True


def option_types(part: type) -> dict[str, Any]:
    """Return the annotation of each of :func:`options`; `Any` if missing or not importable."""
    types: dict[str, Any] = dict.fromkeys(options(part), Any)
    for cls in reversed(part.__mro__[:-1]):
        if "__init__" in vars(cls):
            with suppress(NameError):  # a name that is imported for type checkers alone
                hints = get_type_hints(cls.__init__)  # type: ignore[misc]
                types |= {name: hint for name, hint in hints.items() if name in types}
    return types


def check(kind: str, spec: Mapping[str, Any]) -> Any:
    """Return the class named by ``{"type": name, **options}``, after a check of the options.

    Raises:
        UnknownPartError: an unknown type or option, or a missing one.
        UserError: a value of another type.
    """
    if "type" not in spec:
        names = ", ".join(choices(kind))
        raise UnknownPartError(
            f"a part of {kind} is {dict(spec)}; expected a 'type'; known: {names}",
            reason="no_type",
        )
    name = spec["type"]
    if not isinstance(name, str) or name.startswith(":"):
        raise UnknownPartError(
            f"a part of {kind} has type {name!r}; expected a name or pkg.module:Class",
            reason="unknown_part",
        )
    part = load(kind, name)
    check_options(part, options_of(spec), f"{kind[:-1]} {spec['type']!r}")
    return part


def options_of(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return a part's section without its type."""
    return {name: value for name, value in spec.items() if name != "type"}


def build(kind: str, spec: Mapping[str, Any], *args: Any) -> Any:
    """Make a part from ``{"type": name, **options}``.

    Args:
        kind: one of :func:`kinds`.
        spec: the part's section.
        args: the positional arguments that the toolkit passes to every part of the kind.

    Raises:
        UnknownPartError: see :func:`check`. UserError: see :func:`make`.
    """
    return make(check(kind, spec), *args, **options_of(spec))


def make(part: type, *args: Any, **given: Any) -> Any:
    """Call a part's constructor.

    Raises:
        UnknownPartError: the constructor does not take what parts of the kind are given.
        UserError: the constructor raised a ValueError, which is about one of its options.
    """
    signature = inspect.signature(part)
    try:
        signature.bind(*args, **given)
    except TypeError as error:
        raise UnknownPartError(
            f"{part.__module__}.{part.__name__}{signature} does not take the {len(args)} arguments "
            f"that it is given by position and {', '.join(given) or 'nothing'} by keyword "
            f"({error}); take the positional arguments of its base class, and options after a `*`",
            reason="signature",
        ) from error
    try:
        return part(*args, **given)
    except ValueError as error:
        raise UserError(str(error)) from error
