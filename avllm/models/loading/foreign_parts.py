"""Decide which classes a checkpoint may name: loading one runs no code that came with it.

``pkg.module:Class`` names a class outside of the package, and importing its module runs it. In a
preset the user wrote that name. In a checkpoint somebody else may have written it, so it is refused
before anything is imported, unless the caller allows it by name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import avllm.encoders
from avllm.models.checkpoint_format import CheckpointError
from avllm.models.configuration_avllm import AVConfig

_PREPROCESSORS = "avllm.encoders."


class ForeignPartError(CheckpointError):
    """A checkpoint names code from outside of the package that the caller has not allowed.

    Attributes:
        parts: the names, as ``allow_parts`` takes them.
    """

    def __init__(self, folder: str | Path, parts: Sequence[str]) -> None:
        flags = " ".join(f"--allow-part {part}" for part in parts)
        super().__init__(
            f"{folder} names {', '.join(parts)}, which is code from outside of avllm, and loading "
            f"the checkpoint would run it. If you trust it, allow it by name: {flags} "
            f"(in Python allow_parts={tuple(parts)!r}, in a preset allow_parts: {list(parts)!r})",
            reason="foreign_part",
        )
        self.parts = list(parts)


def check_parts(config: AVConfig, folder: str | Path, allow_parts: Collection[str]) -> None:
    """Refuse a config that names parts of other packages.

    Raises:
        ForeignPartError: one of them is not in ``allow_parts``.
    """
    refuse_foreign([name for name in _part_types(config) if ":" in name], folder, allow_parts)


def check_preprocessors(
    settings: Mapping[str, Any], folder: str | Path, allow_parts: Collection[str]
) -> None:
    """Refuse preprocessors of other packages, by the settings in ``processor_config.json``.

    Raises:
        ForeignPartError: one of them is not in ``allow_parts``.
    """
    names = [str(one.get("part", "")) for one in settings.values() if isinstance(one, dict)]
    refuse_foreign([name for name in names if not _is_built_in(name)], folder, allow_parts)


def refuse_foreign(names: Sequence[str], folder: str | Path, allow_parts: Collection[str]) -> None:
    """Refuse names of foreign parts that the caller has not allowed.

    Raises:
        ForeignPartError: names all of them.
    """
    refused = sorted({name for name in names if name and name not in allow_parts})
    if refused:
        raise ForeignPartError(folder, refused)


def _part_types(config: AVConfig) -> Iterator[str]:
    """Yield the types of all parts that a config names."""
    single = [config.layout, config.time_codec, config.fusion, config.selector]
    for spec in [*config.encoders.values(), *config.connector, *single]:
        if spec is not None:
            yield str(spec.get("type", ""))


def _is_built_in(name: str) -> bool:
    """Return True for ``avllm.encoders.FILE:Class`` with a file of the package itself."""
    module = name.partition(":")[0]
    file = module.removeprefix(_PREPROCESSORS)
    if not module.startswith(_PREPROCESSORS) or "." in file:
        return False
    return (Path(avllm.encoders.__path__[0]) / f"{file}.py").is_file()
