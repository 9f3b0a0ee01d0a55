"""Name the files of a checkpoint folder, read its manifest, hash its backbones; without a model.

    config.json, tokenizer and processor files
    trained.safetensors       the connector, and every part whose own weights were trained
    lora/<set>/               adapter_config.json, adapter_model.safetensors (PEFT's form)
    manifest.json             name, revision and hash of each frozen backbone, the chain of stages
                              with their settings, the hash of each file above

Frozen backbones are not copied: they are loaded by their names, and their hashes are checked.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import save_file
from torch import Tensor

from avllm.data.store.storage import sha256
from avllm.errors import UserError, one_line, writing
from avllm.models.configuration_avllm import AVConfig
from avllm.weights import weight_files

TRAINED, LORA, MANIFEST = "trained.safetensors", "lora", "manifest.json"
OLD_PROCESSOR_NAME = "avllm_processor.json"
IMPORT = "import"
"""The stage of a checkpoint that was made out of published weights."""


class CheckpointError(UserError):
    """A checkpoint folder that is incomplete or does not fit."""


class _BackboneRecord(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")
    name: str | None = None
    revision: str | None = None
    sha256: str | None = None


class _StageRecord(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")
    stage: str
    steps: int | None = None
    settings: dict[str, Any] | None = None
    data: dict[str, Any] = Field(default_factory=dict)


class _ManifestFile(BaseModel):
    """The fields of ``manifest.json``; earlier formats have fewer."""

    model_config = ConfigDict(strict=True, extra="allow")
    format: int = 1
    backbones: dict[str, _BackboneRecord]
    stages: list[_StageRecord]
    files: dict[str, str] = Field(default_factory=dict)


def part_of(name: str) -> str:
    """Return a parameter's part: ``encoders.audio.backbone...`` belongs to ``encoders.audio``."""
    pieces = name.split(".")
    if pieces[0] == "encoders":
        return ".".join(pieces[:2])
    return pieces[0]


def write_tensors(state: dict[str, Tensor], path: Path) -> None:
    """Write tensors so that a kill leaves the old file or the new one, never half of one.

    Raises:
        WriteError: the file cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        save_file(state, partial, metadata={"format": "pt"})
        partial.replace(path)


def read_manifest_of(folder: str | Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint.

    Raises:
        CheckpointError: the folder has none.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {MANIFEST}; expected the folder of a finished avllm run",
            reason="missing",
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        message = f"{path} is damaged ({one_line(error)}); copy the checkpoint again"
        raise CheckpointError(message, reason="damaged") from error
    try:
        _ManifestFile.model_validate(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise CheckpointError(
            f"{path}: {field}: {first['msg'].lower()}; expected the manifest of a checkpoint. Copy "
            "it again",
            reason="damaged",
        ) from error
    return dict(manifest)


def backbones(config: AVConfig, folder: str | Path) -> dict[str, dict[str, Any]]:
    """Return name, revision and hash of each frozen backbone; a checkpoint does not copy them.

    Args:
        config: the model's.
        folder: the checkpoint; an imported one has backbones in it, which it names from there.
    """
    records = {"llm": config.llm, **{f"encoders.{s}": r for s, r in config.encoders.items()}}
    manifest = {}
    for part, record in records.items():
        if part not in config.trained:
            name = record.get("name")
            is_inside = name is not None and (Path(folder) / name).exists()
            manifest[part] = {
                "name": name,
                "revision": record.get("revision"),
                "sha256": fingerprint(str(Path(folder) / name) if is_inside else name),
            }
    return manifest


def find_backbone(name: str | None, folder: str | Path, expected: str | None) -> str | None:
    """Return the folder or file of a backbone that a checkpoint names by a relative path.

    The path is tried from the working directory, from the checkpoint and from each folder above it,
    so that the checkpoint can be read from anywhere. A name without a recorded hash is a hub's.

    Args:
        name: the backbone's name in the checkpoint.
        folder: the checkpoint.
        expected: the backbone's hash; None if none is recorded.
    """
    if name is None or expected is None or Path(name).is_absolute():
        return name
    above = [parent / name for parent in Path(folder).resolve().parents]
    candidates = [Path(name), Path(folder) / name, *above]
    places = [str(path) for path in candidates if path.exists()]
    for place in places:
        if fingerprint(place) == expected:
            return place
    return places[0] if places else name


_hashes: dict[tuple[str, int, int, int], str] = {}


def fingerprint(name: str | None) -> str | None:
    """Return the SHA-256 over weight files; None for a hub name (it has a revision).

    Args:
        name: a folder, one file, or a hub name.
    """
    if name is None or not Path(name).exists():
        return None
    total = hashlib.sha256()
    for path in weight_files(name):
        total.update(f"{path.name}:{sha256_once(path)}\n".encode())
    return total.hexdigest()


def sha256_once(path: Path) -> str:
    """Return the SHA-256 of a file; computed once for its size and time of change."""
    stat = path.stat()
    key = (str(path.resolve()), stat.st_ino, stat.st_size, stat.st_mtime_ns)
    if key not in _hashes:
        _hashes[key] = sha256(path)
    return _hashes[key]


def is_checkpoint(folder: str | os.PathLike[str]) -> bool:
    """Return True if a folder holds a finished checkpoint."""
    return (Path(folder) / TRAINED).is_file() and (Path(folder) / "config.json").is_file()
