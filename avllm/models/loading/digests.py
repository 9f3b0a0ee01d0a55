"""Record the digests of a checkpoint's files in its manifest, and compare them when it is loaded.

Every file is hashed that loading reads, also a tokenizer's or a chat template that was added later:
each of them changes answers. SHA-256 takes about 1 s a GB and core. This finds damage and mixed-up
folders. It proves no origin: whoever changes a file can change the manifest.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avllm.models.checkpoint_format import (
    MANIFEST,
    CheckpointError,
    read_manifest_of,
    sha256_once,
)

PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "spiece.model",
    "chat_template*",
    "additional_chat_templates/*",
)
WRITTEN_BY_MODEL = ("config.json", "trained.safetensors", "lora/*/*")
MODEL_FILES = (*WRITTEN_BY_MODEL, "generation_config.json", "objectives.safetensors")
ALL_FILES = (*MODEL_FILES, *PROCESSOR_FILES)
FORMAT = 2


@dataclass(frozen=True)
class FileComparison:
    """Compare one file of a checkpoint with the manifest.

    Attributes:
        name: relative to the folder.
        state: ``same``, ``changed``, ``missing`` or ``added``.
    """

    name: str
    state: str


def files_of(folder: Path, patterns: Sequence[str]) -> list[str]:
    """Return the files in a folder that loading would read, relative to it and sorted."""
    names = set()
    for pattern in patterns:
        for path in folder.glob(pattern):
            if path.is_file() and not path.name.endswith(".partial"):
                names.add(path.relative_to(folder).as_posix())
    return sorted(names)


def write_manifest(
    folder: Path,
    patterns: Sequence[str],
    backbones: dict[str, Any] | None = None,
    stages: list[dict[str, Any]] | None = None,
) -> None:
    """Write the manifest of files that have just been written.

    Args:
        folder: the checkpoint.
        patterns: the files that were written; digests of others stay as they were recorded.
        backbones, stages: None keeps what the manifest has.
    """
    before: dict[str, Any] = {"backbones": {}, "stages": [], "files": {}}
    if (folder / MANIFEST).is_file():
        before |= read_manifest_of(folder)
    files = {name: digest for name, digest in before["files"].items() if not _is(name, patterns)}
    for name in files_of(folder, patterns):
        files[name] = sha256_once(folder / name)
    manifest = {
        "format": FORMAT,
        "backbones": before["backbones"] if backbones is None else backbones,
        "stages": before["stages"] if stages is None else stages,
        "files": dict(sorted(files.items())),
    }
    partial = folder / (MANIFEST + ".partial")
    partial.write_text(json.dumps(manifest, indent=2, ensure_ascii=False), encoding="utf-8")
    partial.replace(folder / MANIFEST)


def record_processor(folder: Path) -> None:
    """Record the digests of a processor's files, if the folder is a checkpoint."""
    if (folder / MANIFEST).is_file():
        write_manifest(folder, PROCESSOR_FILES)


def _is(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def compare_files(folder: Path, patterns: Sequence[str]) -> list[FileComparison]:
    """Compare the files of a checkpoint with its manifest, in the order of their names.

    Raises:
        CheckpointError: there is no manifest, or it is damaged or of an earlier avllm.
    """
    recorded = read_manifest_of(folder).get("files")
    if not isinstance(recorded, dict):
        raise CheckpointError(
            f"{folder / MANIFEST} has no digests of the checkpoint's files; expected one of this "
            f"version of avllm. If you trust the folder: avllm ckpt verify {folder} --accept",
            reason="no_digests",
        )
    present = files_of(folder, patterns)
    states = []
    for name in sorted({*present, *(name for name in recorded if _is(name, patterns))}):
        if name not in present:
            state = "missing"
        elif name not in recorded:
            state = "added"
        else:
            state = "same" if sha256_once(folder / name) == recorded[name] else "changed"
        states.append(FileComparison(name, state))
    return states


def check_files(folder: Path, patterns: Sequence[str]) -> None:
    """Refuse a checkpoint whose files are not those that were saved.

    Raises:
        CheckpointError: ``files_differ``; names the files.
    """
    odd = [
        f"{one.name} ({one.state})"
        for one in compare_files(folder, patterns)
        if one.state != "same"
    ]
    if odd:
        raise CheckpointError(
            f"{folder} is not as it was saved: {', '.join(odd[:5])}; copy the checkpoint again. If "
            f"the change is yours: avllm ckpt verify {folder} --accept",
            reason="files_differ",
        )
