"""What a checkpoint folder holds: names of files, the manifest, hashes of backbones. No model is touched here.

    config.json, tokenizer and processor files
    trained.safetensors       the connector, and every part whose own weights ever trained
    lora/<set>/               adapter_config.json, adapter_model.safetensors (PEFT's form)
    manifest.json             name, revision and hash of each frozen backbone, the chain of stages with their settings

Frozen backbones are not copied: they are loaded from where their names point, and their hash is checked.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from avllm.data.store.storage import sha256
from avllm.errors import UserError
from avllm.models.configuration_avllm import AVConfig

TRAINED, LORA, MANIFEST = "trained.safetensors", "lora", "manifest.json"


class CheckpointError(UserError):
    """A checkpoint folder that is incomplete or does not fit."""


def part_of(name: str) -> str:
    """``encoders.audio.backbone...`` -> ``encoders.audio``; ``connector.0...`` -> ``connector``."""
    pieces = name.split(".")
    return ".".join(pieces[:2]) if pieces[0] == "encoders" else pieces[0]


def write_tensors(state: dict[str, Tensor], path: Path) -> None:
    """Write tensors so that a kill leaves the old file or the new one, never half of one."""
    partial = path.with_name(path.name + ".partial")
    save_file(state, partial, metadata={"format": "pt"})
    partial.replace(path)


def read_manifest_of(folder: str | Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: the folder has none.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {MANIFEST}; expected the folder of a finished avllm run")
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}; copy the checkpoint again") from error


def backbones(config: AVConfig) -> dict[str, dict[str, Any]]:
    """Name, revision and hash of each backbone whose weights stay where they are."""
    records = {"llm": config.llm, **{f"encoders.{s}": r for s, r in config.encoders.items()}}
    return {
        part: {"name": r.get("name"), "revision": r.get("revision"), "sha256": fingerprint(r.get("name"))}
        for part, r in records.items()
        if part not in config.trained
    }


def find_backbone(name: str | None, folder: str | Path, expected: str | None) -> str | None:
    """Where a backbone lies that a checkpoint names by a relative path: from here, or from a folder above it.

    So a checkpoint is read from any folder. A name without a recorded hash is a hub's, and no folder stands for it.

    Args:
        name: as the checkpoint has it. folder: the checkpoint. expected: the backbone's hash; None = not recorded.
    """
    if name is None or expected is None or Path(name).is_absolute():
        return name
    here = [Path(name), *(parent / name for parent in Path(folder).resolve().parents)]
    there = [str(place) for place in here if place.is_dir()]
    return next((place for place in there if fingerprint(place) == expected), there[0] if there else name)


_known: dict[tuple[str, int, int], str] = {}


def fingerprint(name: str | None) -> str | None:
    """SHA-256 over the weight files of a local folder; None for a hub name, whose revision says it."""
    if name is None or not Path(name).is_dir():
        return None
    total = hashlib.sha256()
    for path in sorted(p for p in Path(name).iterdir() if p.suffix in (".safetensors", ".bin")):
        stat = path.stat()
        key = (str(path.resolve()), stat.st_size, stat.st_mtime_ns)
        if key not in _known:
            _known[key] = sha256(path)
        total.update(f"{path.name}:{_known[key]}\n".encode())
    return total.hexdigest()


def read_config(folder: Path) -> AVConfig:
    """The config.json of a checkpoint.

    Raises:
        CheckpointError: there is none, or it is another model's.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no config.json; expected an avllm checkpoint folder")
    kind = AVConfig.get_config_dict(folder)[0].get("model_type")
    if kind != AVConfig.model_type:
        raise CheckpointError(f"{path} is of a {kind} model; expected an avllm checkpoint folder")
    return AVConfig.from_pretrained(folder)


def is_checkpoint(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a finished checkpoint."""
    return (Path(folder) / TRAINED).is_file() and (Path(folder) / "config.json").is_file()
