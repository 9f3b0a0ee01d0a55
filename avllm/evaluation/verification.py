"""Verify a checkpoint: files against the manifest, backbones, and whether all of it loads."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from avllm.data.store.append_only import write_whole
from avllm.errors import UserError
from avllm.evaluation.listing import inspect_checkpoint
from avllm.models.checkpoint_format import MANIFEST
from avllm.models.loading.digests import ALL_FILES, FileComparison, compare_files, write_manifest
from avllm.models.modeling_avllm import AVLLM
from avllm.models.processing_avllm import AVProcessor


@dataclass(frozen=True)
class Verification:
    """Say what is right and wrong with a checkpoint.

    Attributes:
        files: each file that loading reads.
        backbones: by part, ``same``, ``changed or missing``, or ``not checked`` for a hub name.
        load_error: why it does not load; "" if it loads; None if it was not tried.
    """

    files: list[FileComparison]
    backbones: dict[str, str]
    load_error: str | None

    @property
    def is_good(self) -> bool:
        """Return True if nothing is wrong."""
        same = all(file.state == "same" for file in self.files)
        return same and not self.load_error and "changed or missing" not in self.backbones.values()

    def to_dict(self) -> dict[str, Any]:
        """Return it JSON-able."""
        return {**asdict(self), "is_good": self.is_good}


def verify_checkpoint(
    folder: str | Path,
    *,
    load: bool = True,
    accept: bool = False,
    allow_parts: Collection[str] = (),
    backbones: Mapping[str, str] | None = None,
) -> Verification:
    """Compare a checkpoint with its manifest, then load it as every command does.

    Args:
        folder: the checkpoint.
        load: also build the model and the processor, which finds weights that are missing, do not
            fit, or hold NaN. It is not tried where files differ.
        accept: record the files that are there as the right ones. Where the checkpoint then does
            not load, the manifest stays unchanged.
        allow_parts: parts from outside of the package that the checkpoint may name.
        backbones: other folders of backbones, see :func:`avllm.models.checkpoint.load_model`.

    Raises:
        CheckpointError: there is no manifest, or it is damaged.
    """
    folder = Path(folder)
    manifest = folder / MANIFEST
    before = manifest.read_text("utf-8", "replace") if accept and manifest.is_file() else ""
    if accept:
        write_manifest(folder, ALL_FILES)
    files = compare_files(folder, ALL_FILES)
    states: dict[str, str] = {}
    load_error: str | None = None
    if all(file.state == "same" for file in files):
        places = dict(backbones or {})
        states, load_error = _verify_contents(folder, load, allow_parts, places)
    if load_error and before:
        write_whole(manifest, before)
        load_error = f"{load_error}; the files were not recorded"
    return Verification(files, states, load_error)


def _verify_contents(
    folder: Path, load: bool, allow_parts: Collection[str], places: dict[str, str]
) -> tuple[dict[str, str], str | None]:
    """Return the state of each backbone, and why the checkpoint does not load."""
    words = {None: "not checked", True: "same", False: "changed or missing"}
    backbones: dict[str, str] = {}
    try:
        for part, record in inspect_checkpoint(folder, places)["backbones"].items():
            backbones[part] = words[record["found"]]
        if not load:
            return backbones, None
        AVProcessor.from_pretrained(folder, allow_parts=allow_parts)
        AVLLM.from_pretrained(str(folder), allow_parts=allow_parts, backbones=places)
    except UserError as error:
        return backbones, str(error)
    return backbones, ""
