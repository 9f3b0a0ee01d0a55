"""Take digests of the files that a run reads: manifests, media, and the weights it begins with."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from avllm.config import RunConfig
from avllm.data.index import Manifest
from avllm.data.manifest import digest
from avllm.data.schema import resolve
from avllm.data.store.storage import byte_range_of, local_copy, url_of
from avllm.models.checkpoint_format import (
    LORA,
    find_backbone,
    fingerprint,
    is_checkpoint,
    place_of,
    read_manifest_of,
    sha256_once,
)
from avllm.weights import weight_files

SAMPLED_FILES = 256
"""Media files of a manifest whose bytes are compared: all would take hours where there are many."""
ENDS = 64 * 1024
"""Bytes at the beginning and at the end of a media file that are read."""
HASHED_AT_ONCE = 8
SETTINGS_OF_BACKBONES = ("*.json", "*.jinja", "*.txt", "*.model")
"""Files of a backbone's folder beside its weights: config, tokenizer, preprocessor."""


def inputs(config: RunConfig, before: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """Return digests of the files that a run reads, by kind and name.

    ``manifests`` has manifests and quarantine files, ``media`` at most :data:`SAMPLED_FILES` files
    of each manifest, ``weights`` the stage and the backbones that the run begins with. None is a
    file that is missing.

    Args:
        config: the run.
        before: the digests when the run began. The same media files are read again.
    """
    manifests: dict[str, Path] = {}
    for source in [*config.data.train, *config.data.validation]:
        manifests[source.manifest] = local_copy(source.manifest)
    if before is None:
        media = _sample(name for name, path in manifests.items() if path.is_file())
    else:
        media = {name: media_digest(Path(name)) for name in before.get("media", {})}
    for name in config.data.quarantine:
        manifests[name] = Path(name)
    digests = {name: digest(p) if p.is_file() else None for name, p in manifests.items()}
    return {"manifests": digests, "media": media, "weights": weights(config)}


def _sample(manifests: Iterable[str]) -> dict[str, str | None]:
    """Return the digests of media files spread evenly over each manifest."""
    media: dict[str, str | None] = {}
    for name in manifests:
        manifest = Manifest(name)
        step = max(1, -(-len(manifest) // SAMPLED_FILES))
        for row in range(0, len(manifest), step):
            for part in manifest[row].media[:1]:
                path = resolve(part, manifest.root)
                if _is_here(path):
                    media[str(path)] = media_digest(path)
    return media


def _is_here(path: Path) -> bool:
    """Return True for a file, or a shard's member, of this machine: stores are not asked."""
    span = byte_range_of(path)
    return url_of(span.file if span else path) is None


def media_digest(path: Path) -> str | None:
    """Return a digest of a media file's size and of its ends; None if it cannot be read."""
    span = byte_range_of(path)
    file = Path(span.file) if span else path
    offset = span.offset if span else 0
    try:
        with file.open("rb") as opened:
            size = (span.size if span else None) or file.stat().st_size - offset
            opened.seek(offset)
            first = opened.read(min(size, ENDS))
            opened.seek(offset + max(0, size - ENDS))
            last = opened.read(min(size, ENDS))
    except (OSError, ValueError):  # decoding names what is wrong with it
        return None
    return hashlib.sha256(b"%d\n" % size + first + last).hexdigest()[:32]


def weights(config: RunConfig) -> dict[str, str | None]:
    """Return the digests of the stage and the backbones that a run begins with, by part.

    For a name on the hub it is the commit in the hub's cache; None before the first download.
    """
    digests: dict[str, str | None] = {}
    backbones = list(_backbones(config))
    names = [backbone.name for backbone in backbones]
    files = [path for name in [*names, *_options(config)] for path in weight_files(name)]
    with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
        list(pool.map(sha256_once, files))  # remembered; one by one, large models take minutes
    if config.init is not None:
        folders = [Path(config.init), *sorted((Path(config.init) / LORA).glob("*"))]
        total = hashlib.sha256("".join(str(fingerprint(str(f))) for f in folders).encode())
        digests["init"] = total.hexdigest()
    for backbone in backbones:
        if Path(backbone.name).is_dir():
            digests[backbone.part] = _folder_digest(backbone.name)
        else:
            digests[backbone.part] = _commit(backbone.name, backbone.revision)
    for name in _options(config):
        if Path(name).is_file():
            digests[name] = sha256_once(Path(name))
        elif weight_files(name):
            digests[name] = _folder_digest(name)
    return digests


class _Backbone(NamedTuple):
    """A pretrained model that a run loads: ``llm`` or ``encoders.NAME``, a folder or hub name."""

    part: str
    name: str
    revision: str | None


def _backbones(config: RunConfig) -> Iterator[_Backbone]:
    """Yield the pretrained models that a run loads."""
    records: dict[str, dict[str, Any]] = {}
    if config.init is not None and is_checkpoint(config.init):
        for part, record in read_manifest_of(config.init)["backbones"].items():
            name = place_of(part, config.backbones) or find_backbone(record, config.init)
            records[part] = record | {"name": name}
    if config.model is not None:
        records["llm"] = config.model.llm.model_dump()
        records |= {f"encoders.{name}": spec for name, spec in config.model.encoders.items()}
    if config.extend is not None:
        records |= {f"encoders.{name}": spec for name, spec in config.extend.encoders.items()}
    for part, record in records.items():
        if record.get("name") is not None:
            yield _Backbone(part, str(record["name"]), record.get("revision"))


def _options(config: RunConfig) -> Iterator[str]:
    """Yield options of parts that name files here: some are weights (``init`` of a Q-Former)."""
    specs = list(config.objectives)
    if config.model is not None:
        specs += [*config.model.connector, config.model.fusion or {}, config.model.selector or {}]
    if config.extend is not None:
        specs += config.extend.connector
    for spec in specs:
        for value in spec.values():
            if isinstance(value, str) and os.path.exists(value):  # False for a long text, too
                yield value


def _folder_digest(name: str) -> str:
    """Return the SHA-256 over the weights and settings of a backbone's folder."""
    total = hashlib.sha256(str(fingerprint(name)).encode())
    for pattern in SETTINGS_OF_BACKBONES:
        for path in sorted(Path(name).glob(pattern)):
            total.update(f"{path.name}:{sha256_once(path)}\n".encode())
    return total.hexdigest()


def _commit(name: str, revision: str | None) -> str | None:
    """Return the commit of a hub's model in its cache on this machine; None if it is not there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:  # a folder that does not exist; loading says so
        return None
    return Path(path).parent.name if isinstance(path, str) else None
