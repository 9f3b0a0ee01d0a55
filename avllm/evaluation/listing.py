"""List the contents of a checkpoint folder."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from avllm.data.store.storage import sha256
from avllm.models.checkpoint_format import (
    LORA,
    TRAINED,
    find_backbone,
    fingerprint,
    part_of,
    place_of,
    read_manifest_of,
)
from avllm.models.loading.files import read_config, reading


def inspect_checkpoint(
    folder: str | Path, places: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Describe a checkpoint folder without loading a model.

    Args:
        folder: the checkpoint.
        places: other folders of backbones, ``{"llm": FOLDER, "audio": FOLDER}``.

    Returns:
        ``{"folder", "stages": [...], "backbones": {part: {name, revision, sha256, found}},
        "parameters": {...}, ...}``; ``found`` is True where the backbone lies in the named folder
        with the recorded hash, and None for hub names.

    Raises:
        CheckpointError: there is no manifest, or a file is damaged.
    """
    with reading(folder, "the checkpoint"):
        return _contents(Path(folder), places or {})


def _contents(folder: Path, places: Mapping[str, str]) -> dict[str, Any]:
    manifest = read_manifest_of(folder)
    config = read_config(folder)
    backbones = {}
    for part, record in manifest["backbones"].items():
        given = place_of(part, places)
        backbones[part] = record | {"found": _is_present(record, given, folder)}
    counts: Counter[str] = Counter()
    for name, size in _tensors(folder / TRAINED):
        counts[part_of(name)] += size
    for path in sorted((folder / LORA).glob("*/adapter_model.safetensors")):
        counts[f"llm (LoRA {path.parent.name})"] = sum(size for _, size in _tensors(path))
    return {
        "folder": str(folder),
        "format": manifest.get("format"),
        "stages": manifest["stages"],
        "backbones": backbones,
        "trained": config.trained,
        "connector": [spec["type"] for spec in config.connector],
        "layout": config.layout["type"],
        "fusion": config.fusion["type"] if config.fusion else None,
        "parameters": dict(counts),
        "sha256": {p.name: sha256(p) for p in sorted(folder.glob("*.safetensors"))},
    }


def _is_present(record: dict[str, Any], given: str | None, folder: Path) -> bool | None:
    """Return whether a backbone's folder has the recorded hash; None for a hub name."""
    recorded = record.get("sha256")
    if recorded is None:
        return None
    return fingerprint(given or find_backbone(record, folder)) == recorded


def _tensors(path: Path) -> Iterator[tuple[str, int]]:
    """Yield name and number of elements of each tensor of a file; none where there is no file."""
    if not path.is_file():
        return
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            yield name, math.prod(file.get_slice(name).get_shape())
