"""Compare what an imported checkpoint computes with numbers of the original implementation."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from avllm.errors import UserError, one_line
from avllm.models.checkpoint_format import IMPORT, read_manifest_of
from avllm.models.importing.base import Importer
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
        UserError: the checkpoint was not imported, or the file has no array that it computes.
    """
    folder = Path(folder)
    importer, values = _importer_of(folder)
    arrays = read_arrays(golden)
    model = AVLLM.from_pretrained(str(folder), allow_parts=allow_parts, backbones=backbones)
    computed = importer.replay(model, arrays, values)
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


def _importer_of(folder: Path) -> tuple[type[Importer], dict[str, Any]]:
    """Return the importer that made a checkpoint, and the numbers that it was given.

    Raises:
        UserError: none did.
    """
    stages = read_manifest_of(folder)["stages"]
    if not stages or stages[-1]["stage"] != IMPORT:
        raise UserError(
            f"{folder} was not imported, so that no original is known to compare it with; expected "
            "a checkpoint of `avllm ckpt import`",
            reason="not_imported",
        )
    return load("importers", stages[-1]["importer"]), stages[-1]["settings"]["dims"]


def read_arrays(path: str | Path) -> dict[str, Tensor]:
    """Read the arrays of a ``.npz`` file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: torch.from_numpy(file[name]) for name in file.files}
    except (ValueError, zipfile.BadZipFile, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read ({one_line(error)}); expected arrays as numpy.savez writes "
            "them",
            reason="damaged",
        ) from error


def relative_difference(seen: Tensor, expected: Tensor) -> float:
    """Return the largest difference, divided by the largest magnitude of ``expected``."""
    if seen.shape != expected.shape:
        return math.inf
    expected = expected.double()
    difference = (seen.double() - expected).abs().max().item()
    largest = expected.abs().max().item()
    if not math.isfinite(difference):
        return math.inf
    return difference / largest if largest else difference
