"""Read weight files as other projects publish them, and account for each of their tensors.

A weight that is missing, left over or of another shape is an error. Loading such a file partly
(``strict=False``) gives a model of which some layers are random, and no error.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from avllm.errors import UserError, one_line

MOST_NAMES = 5  # that a message lists


class PublishedError(UserError):
    """A published weight file that is not what its importer expects.

    Reasons: ``missing`` (no such file), ``damaged``, ``weights`` (tensors are missing, left over or
    of another shape), ``settings`` (it has none), ``pattern`` (a pattern that is no regular
    expression).
    """


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a ``.safetensors`` file or of one that ``torch.save`` wrote.

    No code in the file is run. Tensors are mapped into memory and read when they are used, where
    the file's format allows it: of ImageBind's 4.5 GB, its sound takes 0.3.

    Args:
        path: the file; tensors lie on its top level or under ``model`` or ``state_dict``.

    Raises:
        PublishedError: ``missing`` or ``damaged``.
    """
    content = _read(Path(path))
    tensors = _tensors_of(content)
    if not tensors:
        raise PublishedError(
            f"{path} holds no tensors by name; expected a state dict, bare or under 'model'. Is it "
            "another file?",
            reason="damaged",
        )
    return tensors


def read_settings(path: str | Path, name: str) -> dict[str, Any]:
    """Read the settings that a file of ``torch.save`` holds beside its tensors.

    Args:
        path: the file.
        name: under which they lie, such as ``cfg``.

    Raises:
        PublishedError: ``missing``, ``damaged``, or ``settings``: there are none.
    """
    content = _read(Path(path))
    settings = content.get(name) if isinstance(content, Mapping) else None
    if not isinstance(settings, Mapping):
        raise PublishedError(
            f"{path} has no settings under {name!r}; expected the file as its authors publish it. "
            "Is it another model's?",
            reason="settings",
        )
    return {str(key): value for key, value in settings.items()}


def _read(path: Path) -> Any:
    """Return the content of a weight file, of which no code is run."""
    if not path.is_file():
        raise PublishedError(
            f"{path} is not here; expected a file of published weights", reason="missing"
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        is_mappable = zipfile.is_zipfile(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_mappable)
    except Exception as error:  # torch raises a dozen classes for a damaged file
        raise PublishedError(
            f"{path} cannot be read ({one_line(error)}); expected tensors as torch.save or "
            "safetensors write them. Copy it again",
            reason="damaged",
        ) from error


def _tensors_of(content: Any) -> dict[str, Tensor]:
    """Return the tensors of a state dict, or of the one that a training state holds."""
    if not isinstance(content, Mapping):
        return {}
    for name in ("model", "state_dict"):
        if isinstance(content.get(name), Mapping):
            content = content[name]
    return {str(name): x for name, x in content.items() if isinstance(x, Tensor)}


class Published:
    """The tensors of a published file, with an account of which were used.

    Args:
        path: the file, for messages.
        tensors: by their published names.
        allow: regular expressions; tensors whose names they match may be missing or left over.

    Raises:
        PublishedError: ``pattern``.
    """

    def __init__(
        self, path: str | Path, tensors: Mapping[str, Tensor], allow: Sequence[str] = ()
    ) -> None:
        self.path = Path(path)
        self.tensors = dict(tensors)
        self._used: set[str] = set()
        try:
            self._allow = [re.compile(pattern) for pattern in allow]
        except re.error as error:
            raise PublishedError(
                f"allow {list(allow)}: {error}; expected regular expressions like '^optimizer'",
                reason="pattern",
            ) from error

    @classmethod
    def read(cls, path: str | Path, allow: Sequence[str] = ()) -> Published:
        """Read a file, see :func:`read_tensors`."""
        return cls(path, read_tensors(path), allow)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def tensor(self, name: str) -> Tensor:
        """Return a tensor that has to be there, and count it as used.

        Raises:
            PublishedError: ``weights``: there is none.
        """
        if name not in self.tensors:
            raise self._error(f"it has no {name}")
        self._used.add(name)
        return self.tensors[name]

    def blocks(self, pattern: str) -> int:
        r"""Return how many numbered blocks there are, counted from 0.

        Args:
            pattern: with a group for the number, ``blocks\.(\d+)\.``.

        Raises:
            PublishedError: ``weights``: none, or a number larger than that of the tensors.
        """
        matches = [re.match(pattern, name) for name in self.tensors]
        numbers = [int(match[1]) for match in matches if match]
        if not numbers:
            raise self._error(f"no name begins as {pattern}")
        if max(numbers) > len(self.tensors):
            raise self._error(f"it has a block {max(numbers)} among {len(self.tensors)} tensors")
        return max(numbers) + 1

    def take(
        self, expected: Mapping[str, Tensor], published: Callable[[str], str]
    ) -> dict[str, Tensor]:
        """Return the tensors that a module needs, by the module's names.

        Args:
            expected: the module's state; only names and shapes are read.
            published: turns the module's name of a tensor into the published one.

        Returns:
            float tensors in the file's dtype; those that are missing but allowed are left out.

        Raises:
            PublishedError: ``weights``: tensors are missing or of another shape.
        """
        names = {own: published(own) for own in expected}
        missing = sorted(
            name for name in names.values() if name not in self and not self._is_allowed(name)
        )
        if missing:
            raise self._error(f"it has no {_some(missing)}")
        taken = {own: self.tensor(name) for own, name in names.items() if name in self}
        for own, x in taken.items():
            if x.shape != expected[own].shape:
                raise self._error(
                    f"{names[own]} has shape {tuple(x.shape)}; "
                    f"expected {tuple(expected[own].shape)}"
                )
        return taken

    def leave(self, patterns: Iterable[str]) -> None:
        """Count tensors as used that the model does not need.

        Args:
            patterns: regular expressions of whole names.
        """
        for name in self.tensors:
            if any(re.fullmatch(pattern, name) for pattern in patterns):
                self._used.add(name)

    def refuse_rest(self) -> None:
        """Refuse tensors that were not used.

        Raises:
            PublishedError: ``weights``: names them.
        """
        rest = sorted(n for n in self.tensors if n not in self._used and not self._is_allowed(n))
        if rest:
            raise self._error(f"unexpected {_some(rest)}")

    def _is_allowed(self, name: str) -> bool:
        return any(pattern.search(name) for pattern in self._allow)

    def _error(self, seen: str) -> PublishedError:
        return PublishedError(
            f"{self.path}: {seen}; expected the tensors of the published model, each once. Is it "
            "another version's file? What may be missing or left over is allowed by name (allow)",
            reason="weights",
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:MOST_NAMES])
    if len(names) <= MOST_NAMES:
        return shown
    return f"{shown} and {len(names) - MOST_NAMES} more"
