"""A golden file, and the importer that a checkpoint names, may be anybody's."""

from __future__ import annotations

import io
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from answering import make_checkpoint

from avllm.errors import UserError
from avllm.evaluation.golden import compare_golden, read_arrays, relative_difference
from avllm.models.loading.foreign_parts import ForeignPartError
from avllm.published import Published, PublishedError


def test_an_importer_from_outside_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_checkpoint(tmp_path)
    (tmp_path / "strange_importer.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    np.savez(tmp_path / "golden.npz", a=np.zeros(3))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["stages"] = [{"stage": "import", "importer": "strange_importer:Its"}]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ForeignPartError):
        compare_golden(checkpoint, tmp_path / "golden.npz", 1e-4)
    assert "strange_importer" not in sys.modules


@pytest.mark.parametrize("content", ["one array", "words", "objects", "nothing", "huge", "damaged"])
def test_files_that_hold_no_arrays_of_numbers(tmp_path: Path, content: str) -> None:
    path = tmp_path / "golden.npz"
    if content == "one array":
        np.save(tmp_path / "golden.npy", np.zeros(3))
        (tmp_path / "golden.npy").rename(path)
    elif content == "words":
        np.savez(path, a=np.array(["x"]))
    elif content == "objects":
        np.savez(path, a=np.array([{}], dtype=object))
    elif content == "nothing":
        path.write_bytes(b"")
    elif content == "huge":
        header = io.BytesIO()
        claim = {"descr": "<f4", "fortran_order": False, "shape": (10**14,)}
        np.lib.format.write_array_header_1_0(header, claim)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.npy", header.getvalue())
    else:
        np.savez_compressed(path, a=np.arange(1000))
        with path.open("r+b") as file:
            file.seek(60)
            file.write(b"\xff" * 30)
    with pytest.raises(UserError) as refused:
        read_arrays(path)
    assert refused.value.reason == "damaged"


def test_arrays_without_values_are_equal() -> None:
    assert relative_difference(torch.zeros(0, 3), torch.zeros(0, 3)) == 0.0


def test_a_count_of_blocks_is_bounded_by_the_tensors() -> None:
    name = "blocks.{}.weight"
    state = {name.format(number): torch.zeros(1) for number in (0, 1)}
    assert Published("x.pth", state).blocks(r"blocks\.(\d+)\.") == 2
    far = Published("x.pth", state | {name.format(10**12): torch.zeros(1)})
    with pytest.raises(PublishedError) as refused:
        far.blocks(r"blocks\.(\d+)\.")
    assert refused.value.reason == "weights"
