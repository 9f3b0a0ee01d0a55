"""Compare what an imported checkpoint computes with numbers of the original implementation."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from avllm.errors import UserError, one_line
from avllm.models.checkpoint_format import IMPORT, read_manifest_of
from avllm.models.importing.base import Importer
from avllm.models.loading.foreign_parts import refuse_foreign
from avllm.models.modeling_avllm import AVLLM
from avllm.registry import load


@dataclass(frozen=True)
class ArrayComparison:
    """Compare one array with the original's.

    Attributes:
        name: of the array.
        difference: the largest difference, divided by the largest magnitude of the original's
            array; infinite where shapes differ or a value is not finite, None for an array of a
            branch that the checkpoint does not have.
        is_good: the difference is at most the tolerance, or there is none.
    """

    name: str
    difference: float | None
    is_good: bool

    def to_dict(self) -> dict[str, Any]:
        """Return it JSON-able."""
        return asdict(self)


@torch.no_grad()
def compare_golden(
    folder: str | Path,
    golden: str | Path,
    tolerance: float,
    allow_parts: Collection[str] = (),
    backbones: dict[str, str] | None = None,
) -> list[ArrayComparison]:
    """Run an imported checkpoint on the inputs of a golden file, and compare its arrays.

    Args:
        folder: the checkpoint.
        golden: ``.npz`` file with the importer's inputs and the original's arrays.
        tolerance: largest relative difference.
        allow_parts: parts from outside of the package that the checkpoint may name.
        backbones: other folders of backbones.

    Raises:
        ForeignPartError: the checkpoint names an importer from outside that is not allowed.
        UserError: the checkpoint was not imported, cannot be run on the file's inputs, or the file
            has no array that it computes.
    """
    folder = Path(folder)
    importer, values = _importer_of(folder, allow_parts)
    arrays = read_arrays(golden)
    model = AVLLM.from_pretrained(str(folder), allow_parts=allow_parts, backbones=backbones)
    computed = _computed(importer, model, arrays, values, golden)
    comparisons = []
    for name, expected in arrays.items():
        if name in importer.inputs:
            continue
        difference = None
        if name in computed:
            difference = relative_difference(computed[name], expected)
        is_good = difference is None or difference <= tolerance
        comparisons.append(ArrayComparison(name, difference, is_good))
    if all(one.difference is None for one in comparisons):
        raise UserError(
            f"{golden} has the arrays {', '.join(arrays) or 'none'}, of which {folder} computes "
            f"none; expected inputs ({', '.join(importer.inputs)}) with what the original makes "
            "of them",
            reason="golden",
        )
    return comparisons


def _computed(
    importer: type[Importer],
    model: AVLLM,
    arrays: Mapping[str, Tensor],
    values: Mapping[str, Any],
    golden: str | Path,
) -> dict[str, Tensor]:
    """Return what a model computes of the inputs in a golden file.

    Raises:
        UserError: their shapes or dtypes do not fit the model.
    """
    try:
        return importer.replay(model, arrays, values)
    except UserError:
        raise
    except Exception as error:  # each layer refuses odd inputs in its own way
        raise UserError(
            f"{golden}: the checkpoint cannot be run on its inputs ({one_line(error)}); expected "
            f"{', '.join(importer.inputs)} in the original's shapes and dtypes",
            reason="golden",
        ) from error


def _importer_of(
    folder: Path, allow_parts: Collection[str]
) -> tuple[type[Importer], dict[str, Any]]:
    """Return the importer that made a checkpoint, and the numbers that it was given.

    Raises:
        ForeignPartError: it is code from outside of the package that is not allowed.
        UserError: none did.
    """
    stages = read_manifest_of(folder)["stages"]
    if not stages or stages[-1]["stage"] != IMPORT:
        raise UserError(
            f"{folder} was not imported, so that no original is known to compare it with; expected "
            "a checkpoint of `avllm ckpt import`",
            reason="not_imported",
        )
    name = str(stages[-1].get("importer"))
    if ":" in name:
        refuse_foreign([name], folder, allow_parts)
    settings = stages[-1].get("settings") or {}
    return load("importers", name), settings.get("dims", {})


def read_arrays(path: str | Path) -> dict[str, Tensor]:
    """Read the arrays of a ``.npz`` file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: torch.from_numpy(file[name]) for name in file.files}
    except OSError:
        raise
    except Exception as error:  # numpy, zipfile, zlib and torch raise a dozen classes
        raise UserError(
            f"{path} cannot be read ({one_line(error)}); expected arrays of numbers as numpy.savez "
            "writes them",
            reason="damaged",
        ) from error


def relative_difference(seen: Tensor, expected: Tensor) -> float:
    """Return the largest difference, divided by the largest magnitude of ``expected``."""
    if seen.shape != expected.shape:
        return math.inf
    if not expected.numel():
        return 0.0
    expected = expected.double()
    difference = (seen.double() - expected).abs().max().item()
    largest = expected.abs().max().item()
    if not math.isfinite(difference):
        return math.inf
    return difference / largest if largest else difference
