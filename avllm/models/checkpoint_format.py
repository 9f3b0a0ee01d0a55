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
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import save_file
from torch import Tensor

from avllm.data.store.storage import sha256
from avllm.errors import UserError, looked_in, one_line, writing
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
            f"{folder} has no {MANIFEST}; expected the folder of a finished avllm run"
            f"{looked_in(folder)}",
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

    The place is the backbone as seen from the checkpoint, None for a hub's.

    Args:
        config: the model's.
        folder: the checkpoint; an imported one has backbones in it, which it names from there.
    """
    manifest = {}
    for part, record in backbone_records(config).items():
        name = record.get("name")
        if part not in config.trained:
            path = None if name is None else _local(name, folder)
            manifest[part] = {
                "name": name,
                "revision": record.get("revision"),
                "sha256": fingerprint(name if path is None else str(path)),
                "place": None if path is None else os.path.relpath(path, Path(folder).resolve()),
            }
    return manifest


def _local(name: str, folder: str | Path) -> Path | None:
    """Return the folder or file of a backbone, in the checkpoint or elsewhere; None for a hub's."""
    for path in (Path(folder, name), Path(name)):
        if path.exists():
            return path.resolve()
    return None


def backbone_records(config: AVConfig) -> dict[str, dict[str, Any]]:
    """Return the LLM's and the encoders' records by part: ``llm``, ``encoders.audio``, ..."""
    return {"llm": config.llm, **{f"encoders.{s}": r for s, r in config.encoders.items()}}


def find_backbone(record: Mapping[str, Any], folder: str | Path) -> str | None:
    """Return the folder or file of a backbone, or its name where it is on the hub or nowhere.

    The working directory makes no difference. Of several places, the first one with the recorded
    hash is right; if none has it, the first.

    Args:
        record: of the checkpoint's manifest.
        folder: the checkpoint.
    """
    places = [str(path) for path in backbone_places(record, folder) if path.exists()]
    for place in places:
        if fingerprint(place) == record.get("sha256"):
            return place
    return places[0] if places else record.get("name")


def backbone_places(record: Mapping[str, Any], folder: str | Path) -> list[Path]:
    """Return the places in which a backbone is looked for; none for a hub's.

    They are the one where it was, the one that lies to the checkpoint as it did, and, for a name
    that is no whole path, that name from the checkpoint and from each folder above it.
    """
    name = record.get("name")
    if name is None or record.get("sha256") is None:
        return []
    folder = Path(folder).resolve()
    places = [Path(name)] if Path(name).is_absolute() else []
    if isinstance(record.get("place"), str):
        places.append(Path(os.path.normpath(folder / record["place"])))
    if not Path(name).is_absolute():
        places += [above / name for above in (folder, *folder.parents)]
    return list(dict.fromkeys(places))


def place_of(part: str, places: Mapping[str, str]) -> str | None:
    """Return the place that is given for a backbone, by its part or its stream; None for none."""
    return places.get(part) or places.get(part.removeprefix("encoders."))


def read_backbones(texts: Iterable[str]) -> dict[str, str]:
    """Return the places of backbones that a command's ``--backbone PART=FOLDER`` options name.

    Raises:
        UserError: an option of another form.
    """
    places = {}
    for text in texts:
        part, equals, place = text.partition("=")
        if not (part and equals and place):
            raise UserError(
                f"--backbone is {text!r}; expected PART=FOLDER: llm=/models/llm, audio=/models/x",
                reason="backbone",
            )
        places[part] = place
    return places


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
