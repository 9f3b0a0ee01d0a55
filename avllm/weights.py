"""Check weight files, and the settings of models that are built for them, before memory is taken.

A config is a few hundred bytes and may ask for a million layers. What it asks for is held against
the weight files that come with it: a model without weights is built first, and building stops as
soon as the model is larger than the files could fill.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from avllm.errors import UserError, one_line

WEIGHT_SUFFIXES = (".safetensors", ".bin")
MOST_LAYERS = 10_000
"""More than any model has. Some configs make a list of this length while they are read."""
MOST_NUMBER = 2**40
_FETCHES_CODE = ("auto_map", "custom_pipelines")
_NAMES_KERNEL = ("attn_implementation", "experts_implementation")
_COUNTS_LAYERS = ("layers", "blocks", "depth")


class WeightError(UserError):
    """Weights or settings of a model that nothing can be built from.

    Reasons: ``too_large``, ``not_finite``, ``damaged``, ``foreign_code``.
    """


@dataclass(frozen=True)
class Size:
    """Hold the most that weight files can contain: tensors, and single weights.

    A byte counts as eight weights, so that quantised files are no exception.
    """

    tensors: int
    weights: int


ANY_SIZE = Size(100_000, 10**13)
"""Of weights that are not on this machine yet; no model is larger."""


def size_of(files: Iterable[Path]) -> Size:
    """Return what weight files hold; the headers alone are read.

    Raises:
        WeightError: a file is damaged.
    """
    tensors = 0
    size = 0
    for path in files:
        size += path.stat().st_size
        tensors += _count_tensors(path)
    return Size(tensors, 8 * size)


def _count_tensors(path: Path) -> int:
    if path.suffix != ".safetensors":
        return max(
            1, path.stat().st_size // 64
        )  # a pickle has no header; 64 bytes for each at least
    try:
        with safe_open(path, "pt") as file:
            return len(file.keys())
    except (SafetensorError, OSError) as error:
        raise WeightError(
            f"{path} is damaged ({one_line(error)}); copy it again", reason="damaged"
        ) from error


def weight_files(folder: str | Path) -> list[Path]:
    """Return the weight files of a local model: of its folder, or the file; none for a hub name."""
    folder = Path(folder)
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES)


def whole_name(name: str | None) -> str | None:
    """Return the whole path of a model's folder; the name of a hub's model unchanged."""
    if name is None or not Path(name).is_dir():
        return name
    return str(Path(name).absolute())


@contextmanager
def no_larger_than(size: Size, what: str) -> Iterator[None]:
    """Stop building modules in a block that would be larger than weight files could fill.

    Args:
        size: of the files.
        what: the thing that is built, in the user's words.

    Raises:
        WeightError: ``too_large``.
    """
    most = Size(4 * size.tensors + 1000, size.weights + 100_000)
    tensors = 0
    weights = 0
    modules = 0

    def count_parameter(_: nn.Module, name: str, parameter: Tensor | None) -> None:
        nonlocal tensors, weights
        if parameter is not None:
            tensors += 1
            weights += parameter.numel()
            stop_if_larger()

    def count_module(_: nn.Module, name: str, module: nn.Module | None) -> None:
        nonlocal modules
        modules += 1
        stop_if_larger()

    def stop_if_larger() -> None:
        if tensors > most.tensors or weights > most.weights or modules > 10 * most.tensors:
            raise WeightError(
                f"{what}: the settings ask for more than {tensors:,} tensors with "
                f"{weights:,} weights; the files hold {size.tensors:,} tensors. They belong to "
                "different models, or the settings are damaged; copy both again",
                reason="too_large",
            )

    hooks = [
        torch_module.register_module_parameter_registration_hook(count_parameter),
        torch_module.register_module_module_registration_hook(count_module),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def check_model_folder(name: str | Path) -> None:
    """Check ``config.json`` of a local model's folder, before a library reads it.

    Raises:
        WeightError: see :func:`check_settings`, or the file is damaged.
    """
    path = Path(name) / "config.json"
    if not path.is_file():
        return
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise WeightError(
            f"{path} is damaged ({one_line(error)}); copy it again", reason="damaged"
        ) from error
    check_settings(settings, path)


def check_settings(settings: Any, path: str | Path, *, numbers: bool = True) -> None:
    """Refuse settings of a transformers model that name code, or a size that no model has.

    Args:
        settings: of ``config.json`` or a part of it.
        path: the file, for messages.
        numbers: False for a tokenizer's, whose longest text may be a number like 1e30.

    Raises:
        WeightError: names the setting.
    """
    if isinstance(settings, list):
        for item in settings:
            check_settings(item, path, numbers=numbers)
    if not isinstance(settings, dict):
        return
    for name, value in settings.items():
        _refuse_code(str(name), value, path)
        if numbers:
            _check_number(str(name), value, path)
        check_settings(value, path, numbers=numbers)


def _refuse_code(name: str, value: Any, path: str | Path) -> None:
    is_kernel = name.endswith(_NAMES_KERNEL) and any(mark in str(value) for mark in "/:")
    if (name in _FETCHES_CODE and value) or is_kernel:
        raise WeightError(
            f"{path}: {name} is {value!r}, which names code that would be run; expected a model "
            "that transformers itself has. Remove the entry, or choose another model",
            reason="foreign_code",
        )


def _check_number(name: str, value: Any, path: str | Path) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        return
    most = MOST_LAYERS if name.endswith(_COUNTS_LAYERS) else MOST_NUMBER
    if abs(value) > most:
        raise WeightError(
            f"{path}: {name} is {value}; expected at most {most}. The file is damaged: "
            "copy it again",
            reason="too_large",
        )


def check_finite(tensors: Iterable[tuple[str, Tensor]], where: str | Path) -> None:
    """Refuse weights with NaN or infinite values; 0.3 to 0.6 s a GiB on one core.

    Args:
        tensors: by name.
        where: the file or model, for the message.

    Raises:
        WeightError: ``not_finite``; names the first of them.
    """
    for name, tensor in tensors:
        if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
            continue
        values = tensor.detach()
        if values.element_size() < 2:
            values = values.float()
        low, high = torch.aminmax(values)
        if not (math.isfinite(low.item()) and math.isfinite(high.item())):
            raise WeightError(
                f"{where}: {name} holds NaN or infinite values, and every answer would be noise. "
                "Copy the file again; if it was saved like this, its training had diverged",
                reason="not_finite",
            )
