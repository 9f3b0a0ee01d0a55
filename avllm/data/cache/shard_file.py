"""Write and read one shard: entries with their checksums, in a safetensors file."""

from __future__ import annotations

import json
import uuid
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from avllm.data.cache.disk import CacheError
from avllm.data.store.append_only import sync
from avllm.errors import writing

CHECKSUMS = "crc32"
"""Field of a shard's header: checksums by key, as JSON."""


class DamagedShardError(CacheError):
    """A shard cannot be read."""


def write_shard(path: Path, entries: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write tensors ``{key: {STREAM/KIND: tensor}}`` as one shard, with a checksum of each entry.

    Raises:
        WriteError: the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    checksums: dict[str, str] = {}
    for key, entry in entries.items():
        checksums[key] = checksum(entry)
        for name, tensor in entry.items():
            tensors[f"{key}/{name}"] = tensor
    with whole_file(path) as partial:
        # One field: safetensors writes several in any order, and equal shards have equal bytes.
        save_file(tensors, partial, metadata={CHECKSUMS: json.dumps(checksums)})


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to, which no other process has; it replaces ``path`` at the end.

    Raises:
        WriteError: the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with writing(path):
            yield partial
            sync(partial)
            partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def open_shard(path: Path) -> Any:
    """Open a shard for reading.

    Raises:
        DamagedShardError: it cannot be read. FileNotFoundError: it does not exist.
    """
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise DamagedShardError(
            f"{path} is no whole shard of features ({error})", reason="damaged_shard"
        ) from error


def keys_of(shard: Any) -> set[str]:
    """Return the keys of an open shard's entries."""
    return {name.partition("/")[0] for name in shard.keys()}  # noqa: SIM118 (no mapping)


def read_entry(shard: Any, key: str) -> dict[str, Tensor]:
    """Return an entry's tensors by ``STREAM/KIND``; none where the open shard does not hold it."""
    tensors: dict[str, Tensor] = {}
    for name in shard.keys():  # noqa: SIM118 (safe_open is no mapping)
        owner, _, rest = name.partition("/")
        if owner == key:
            tensors[rest] = shard.get_tensor(name)
    return tensors


def is_intact(shard: Any, key: str, tensors: Mapping[str, Tensor]) -> bool:
    """Return whether an entry's tensors have the checksum in the header of their open shard."""
    try:
        recorded = json.loads((shard.metadata() or {}).get(CHECKSUMS, "{}"))
        return bool(recorded.get(key) == checksum(tensors))
    except (ValueError, AttributeError):  # the header itself is damaged
        return False


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Return the CRC-32 over names, dtypes, shapes and bytes of tensors; about 2 GB/s."""
    value = 0
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        about = f"{name} {tensor.dtype} {tuple(tensor.shape)}\n"
        value = zlib.crc32(about.encode(), value)
        content: Any = tensor.flatten().view(torch.uint8).numpy()
        value = zlib.crc32(content, value)
    return f"{value:08x}"
