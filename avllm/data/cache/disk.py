"""Keep a feature cache within its size limit: the shards used longest ago are deleted first.

A shard that a run needs is never deleted.
"""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import re
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from avllm.errors import UserError

_SHARD = re.compile(r"[0-9a-f]{32}")
STALE = 86_400.0  # seconds after which the process that wrote a partial shard must have died


class CacheError(UserError):
    """The cache cannot be used for this run: its features would be wrong, or do not fit."""


class FolderInUse:
    """Mark a folder as read by a run for as long as this object (or the process) lives.

    It holds a shared lock on the folder itself, which leaves no file behind and ends with the
    process, however that ends. Where the file system has no locks, nothing is deleted.
    """

    def __init__(self, folder: Path) -> None:
        self._handle = os.open(folder, os.O_RDONLY)
        self._has_locks = True
        try:
            fcntl.flock(self._handle, fcntl.LOCK_SH)
        except OSError:
            self._has_locks = False

    def __del__(self) -> None:
        os.close(self._handle)

    @contextmanager
    def exclusive(self) -> Iterator[bool]:
        """Keep other runs from the folder within the block; yield False when one reads from it."""
        if not self._has_locks:
            yield False
            return
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            acquired = True
        except BlockingIOError:
            acquired = False
        try:
            yield acquired
        finally:
            fcntl.flock(self._handle, fcntl.LOCK_SH)


def shards_of(folder: Path) -> list[Path]:
    """List the whole shards of a folder, by their names: other files in it are not the cache's."""
    return sorted(path for path in folder.glob("*.safetensors") if _SHARD.fullmatch(path.stem))


def cost_file(shard: Path) -> Path:
    """Return the file beside a shard that holds how long its clips took to make."""
    return shard.with_suffix(".json")


def touch(folder: Path, names: Collection[str]) -> None:
    """Record that shards are used now, in their access time, which reading may not change."""
    now = time.time_ns()
    for name in names:
        path = folder / name
        try:
            os.utime(path, ns=(now, path.stat().st_mtime_ns))
        except OSError as error:
            # Another user's shard, whose own runs record its use; a folder mounted for reading.
            if not isinstance(error, PermissionError) and error.errno != errno.EROFS:
                raise


def make_room(
    folder: Path,
    in_use: FolderInUse,
    needed: Collection[str],
    incoming: int,
    limit: int,
) -> list[str]:
    """Delete the shards used longest ago until ``incoming`` more bytes fit into the limit.

    Args:
        folder: of the cache.
        in_use: this run's mark on the folder.
        needed: names of the shards that this run needs; they are not deleted.
        incoming: bytes that will be written.
        limit: bytes of all shards together.

    Returns:
        the names of the deleted shards.

    Raises:
        CacheError: the run needs more than the limit, or another run reads from the folder.
    """
    sizes = {path.name: path.stat().st_size for path in shards_of(folder)}
    needed_size = sum(size for name, size in sizes.items() if name in needed) + incoming
    if needed_size > limit:
        raise CacheError(
            f"the features of this run take {gigabytes(needed_size)} in {folder}, and "
            f"data.cache_max_gb is {gigabytes(limit)}. Raise it to at least "
            f"{needed_size / 1e9 + 0.005:.2f}, keep them in half precision (data.cache_dtype), or "
            "leave out data.cache",
            reason="too_large",
        )
    surplus = sum(sizes.values()) + incoming - limit
    if surplus <= 0:
        return []
    gc.collect()  # a run that ended in this process may not have released its mark yet
    with in_use.exclusive() as acquired:
        if not acquired:
            raise CacheError(
                f"{gigabytes(surplus)} have to be deleted from {folder} (data.cache_max_gb is "
                f"{gigabytes(limit)}), but another run reads from it, or it cannot be "
                "locked. Wait for that run's end, give another data.cache, or raise "
                "data.cache_max_gb",
                reason="in_use",
            )
        unneeded = {name: size for name, size in sizes.items() if name not in needed}
        return _evict(folder, unneeded, surplus)


def _evict(folder: Path, sizes: dict[str, int], surplus: int) -> list[str]:
    """Delete stale partial files, then shards by last use until the surplus is gone."""
    for partial in folder.glob(".*.partial"):
        if time.time() - partial.stat().st_mtime > STALE:
            partial.unlink()
    last_use = {name: (folder / name).stat().st_atime_ns for name in sizes}
    deleted: list[str] = []
    for name in sorted(sizes, key=lambda name: (last_use[name], name)):
        if surplus <= 0:
            break
        (folder / name).unlink()
        cost_file(folder / name).unlink(missing_ok=True)
        deleted.append(name)
        surplus -= sizes[name]
    return deleted


def gigabytes(size: float) -> str:
    """Return bytes as text, ``1.25 GB``, with more digits for less than 0.1 GB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e9:.6f} GB"
