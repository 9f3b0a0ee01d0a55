"""Room on the disk for a feature cache: shards that were used longest ago leave, those that a run needs never do."""

from __future__ import annotations

import fcntl
import gc
import os
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from avllm.errors import UserError

STALE = 86_400.0  # seconds after which a half-written shard has been left by a process that died


class CacheError(UserError):
    """The cache cannot be used for this run: its features would be wrong, or have no room."""


class Use:
    """That a run reads from the folder, for as long as this object (or the process) lives.

    A shared lock on the folder itself: it leaves no file behind and dies with the process, however that ends.
    """

    def __init__(self, folder: Path) -> None:
        self._handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(self._handle, fcntl.LOCK_SH)

    def __del__(self) -> None:
        os.close(self._handle)

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Within this no other run reads from the folder; False where one does."""
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except BlockingIOError:
            free = False
        try:
            yield free
        finally:
            fcntl.flock(self._handle, fcntl.LOCK_SH)


def shards_of(folder: Path) -> list[Path]:
    """The whole shards of a folder."""
    return sorted(folder.glob("*.safetensors"))


def seconds_of(shard: Path) -> Path:
    """The small file beside a shard that keeps what its clips took to make."""
    return shard.with_suffix(".json")


def touch(folder: Path, names: Collection[str]) -> None:
    """Remember that shards are used now (in their access time, which reading alone may not change)."""
    now = time.time_ns()
    for name in names:
        path = folder / name
        try:
            os.utime(path, ns=(now, path.stat().st_mtime_ns))
        except PermissionError:  # another user's, whose own runs say when it was used
            continue


def make_room(folder: Path, use: Use, keep: Collection[str], wanted: int, limit: int) -> list[str]:
    """Delete shards, those used longest ago first, until ``wanted`` more bytes stay within the limit.

    Args:
        folder: of the cache.
        use: this run's.
        keep: names of the shards that this run needs.
        wanted: bytes that will be written.
        limit: bytes of all shards together.

    Returns:
        the names of the shards that left.

    Raises:
        CacheError: what the run needs is more than the limit, or another run reads from the folder.
    """
    sizes = {path.name: path.stat().st_size for path in shards_of(folder)}
    needed = sum(size for name, size in sizes.items() if name in keep) + wanted
    if needed > limit:
        raise CacheError(
            f"the features of this run take {gigabytes(needed)} in {folder}, and data.cache_max_gb is "
            f"{gigabytes(limit)}. Raise it to at least {needed / 1e9 + 0.005:.2f}, keep them in half precision "
            "(data.cache_dtype), or leave out data.cache"
        )
    surplus = sum(sizes.values()) + wanted - limit
    if surplus <= 0:
        return []
    gc.collect()  # a run that has ended in this process may not have given back its use
    with use.alone() as free:
        if not free:
            raise CacheError(
                f"{gigabytes(surplus)} have to leave {folder} (data.cache_max_gb is {gigabytes(limit)}), but another "
                "run reads from it. Wait for its end, give another data.cache, or raise data.cache_max_gb"
            )
        return _evict(folder, {name: size for name, size in sizes.items() if name not in keep}, surplus)


def _evict(folder: Path, sizes: dict[str, int], surplus: int) -> list[str]:
    for partial in folder.glob(".*.partial"):
        if time.time() - partial.stat().st_mtime > STALE:
            partial.unlink()
    gone: list[str] = []
    for name in sorted(sizes, key=lambda name: ((folder / name).stat().st_atime_ns, name)):
        if surplus <= 0:
            break
        (folder / name).unlink()
        seconds_of(folder / name).unlink(missing_ok=True)
        gone.append(name)
        surplus -= sizes[name]
    return gone


def gigabytes(size: float) -> str:
    """Bytes for people: ``1.25 GB``, with more digits for what is small."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e9:.6f} GB"
