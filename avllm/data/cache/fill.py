"""Compute features of frozen encoders once, so that no clip is decoded or encoded a second time.

An entry is content-addressed: file hash, interval, preparation of frames and sound, the encoders'
weights and options, and the dtype make up its key, so that any change of them is a miss and never a
wrong hit. Entries lie in safetensors shards, each written whole or not at all; the shards' own
headers are the index.

A run computes what is missing before its first step (each clip once, as a first epoch would), or
``avllm data encode`` does so beforehand. So all epochs read the same bits, also those of a run that
was killed and continues.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.progress import track
from torch import nn

from avllm import distributed
from avllm.data.cache.disk import CacheError, make_room, touch
from avllm.data.cache.hashes import Hashes
from avllm.data.cache.recipe import recipe
from avllm.data.cache.store import FeatureCache, Filled, place_name
from avllm.data.collate import gather_stream
from avllm.data.media.load import MediaError
from avllm.data.reading import Place, Prepare, Prepared, Reading, read_batches
from avllm.data.schema import RowError, resolve
from avllm.log import logger

__all__ = [
    "CacheEngine",
    "CacheError",
    "ClipEncoding",
    "FeatureCache",
    "Filled",
    "encode",
    "encode_places",
    "fill",
    "recipe",
]

LOG = logger(__name__)
CacheEngine = Callable[[FeatureCache, Sequence[Place], int], Generator[Filled, None, None]]
"""Encodes media parts into a cache, a number of them a shard, and reports on each shard."""
CHECKED_AT_START = 64 * 10**9
"""Bytes of a process's share of shards that are compared with their checksums before a run (about
half a minute). What lies beyond is checked when it is read, and damaged rows of it are left out."""


@dataclass(frozen=True)
class ClipEncoding:
    """Say how media parts become features.

    Attributes:
        prepare: decodes media parts and prepares them for the encoders.
        encoders: frozen, by stream.
        device: that they run on.
        num_workers: processes that decode.
        batch_size: clips encoded at once and written as one shard.
        autocast: the precision that training runs in.
    """

    prepare: Prepare
    encoders: nn.ModuleDict
    device: torch.device
    num_workers: int = 0
    batch_size: int = 32
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext


def fill(
    cache: FeatureCache,
    places: Sequence[Place],
    encoding: ClipEncoding,
    *,
    max_bytes: int | None = None,
    engine: CacheEngine | None = None,
) -> int:
    """Decode and encode what the cache does not hold yet; each process does its share.

    Args:
        cache: to be filled.
        places: media parts; repeated ones count once.
        encoding: how they become features.
        max_bytes: of all shards in the folder; those used longest ago are deleted. None = no limit.
        engine: encodes what is missing; None = this process.

    Returns:
        how many clips this process encoded; ``cache.filled`` holds all counts.

    Raises:
        CacheError: this run needs more than ``max_bytes``. It is raised after the first shard, from
            whose size the rest is estimated, or at the end.
    """
    began = time.perf_counter()
    needed = _share_keys(cache, places, encoding.num_workers)
    _claim(cache, needed)
    _drop_damaged(cache, needed, encoding.num_workers)
    missing = _missing(cache, needed)
    own_keys = missing[distributed.rank() :: distributed.world_size()]
    own_places = _Selection(places, [needed[key] for key in own_keys])
    if missing:
        LOG.info("encoding %d of %d clips into %s", len(missing), len(needed), cache.folder)
    if engine is None:
        shards = encode_places(cache, own_places, encoding)
    else:
        shards = engine(cache, own_places, encoding.batch_size)
    total = Filled(needed=len(needed), cached=len(needed) - len(missing))
    more_shards = -(-len(own_places) // encoding.batch_size) - 1  # after the first, rounded up
    with closing(shards):
        total.add(next(shards, Filled()))
        _limit(cache, needed, total, len(missing), max_bytes)
        quiet = more_shards <= 0 or not distributed.is_main()
        for shard in track(shards, "features", total=more_shards, disable=quiet):
            total.add(shard)
    _settle(cache, needed, total.failed)
    _limit(cache, needed, total, 0, max_bytes)
    total.seconds = time.perf_counter() - began
    cache.filled = total
    return total.encoded


def encode_places(
    cache: FeatureCache,
    places: Sequence[Place],
    encoding: ClipEncoding,
) -> Generator[Filled, None, None]:
    """Encode media parts into the cache shard by shard, whether or not it holds them.

    This is the work of one process, of any engine. It yields a report on each shard.
    """
    encoding.encoders.to(encoding.device).eval()
    batches = read_batches(places, encoding.prepare, encoding.batch_size, encoding.num_workers)
    for readings in batches:
        yield _encode_shard(cache, places, readings, encoding)


def _encode_shard(
    cache: FeatureCache,
    places: Sequence[Place],
    readings: list[Reading],
    encoding: ClipEncoding,
) -> Filled:
    """Encode decoded clips and write them as one shard; report those that failed to decode."""
    prepared: dict[str, Prepared] = {}
    report = Filled()
    decoding_seconds = 0.0
    for reading in readings:
        key = cache.key(places[reading.number])
        if isinstance(reading.found, dict):
            prepared[key] = reading.found
            decoding_seconds += reading.seconds
        else:
            report.failed[key] = reading.found
    began = time.perf_counter()
    with torch.no_grad(), encoding.autocast():
        encoded = encode(list(prepared.values()), encoding.encoders, encoding.device)
    encoding_seconds = time.perf_counter() - began
    if prepared:
        clips = dict(zip(prepared, encoded, strict=True))
        count = len(clips)
        report.encoded = count
        report.size = cache.put(clips, decoding_seconds / count, encoding_seconds / count)
    return report


@dataclass
class _Selection(Sequence[Place]):
    """Select some of many media parts, which are read from the manifest only when accessed."""

    places: Sequence[Place]
    numbers: list[int]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, number: int) -> Place:  # type: ignore[override]
        return self.places[self.numbers[number]]


def _share_keys(cache: FeatureCache, places: Sequence[Place], threads: int) -> dict[str, int]:
    """Compute the keys of all media parts; each process hashes its share of the files.

    Returns:
        for each distinct key the number of the first part that has it, in order of the parts.
    """
    rank = distributed.rank()
    processes = distributed.world_size()
    # Consecutive parts, so that the intervals of a file stay together.
    share = range(len(places) * rank // processes, len(places) * (rank + 1) // processes)
    hashes = Hashes(cache.folder)
    files = (resolve(part, root) for root, part in (places[number] for number in share))
    hashes.add(files, threads, distributed.is_main())
    keys: dict[str, str] = {}
    first_numbers: dict[str, int] = {}
    for number in share:
        place = places[number]
        root, part = place
        key = cache.key(place, hashes[resolve(part, root)])
        keys[place_name(place)] = key
        first_numbers.setdefault(key, number)
    needed: dict[str, int] = {}
    for other_keys, other_numbers in distributed.gather_objects((keys, first_numbers)):
        cache.keys |= other_keys
        for key, number in other_numbers.items():
            needed[key] = min(number, needed.get(key, number))
    return dict(sorted(needed.items(), key=lambda item: item[1]))


def _claim(cache: FeatureCache, needed: Iterable[str]) -> None:
    """Keep other runs from deleting the shards that exist."""
    if distributed.is_main():
        cache.mark_in_use()
    distributed.barrier()
    cache.read_index()
    if distributed.is_main():
        touch(cache.folder, cache.shards(needed))


def _drop_damaged(cache: FeatureCache, needed: Iterable[str], threads: int) -> None:
    """Compare entries with their checksums; what lies in damaged shards will be made again.

    Also the entries beside a damaged one: encoded in the batch in which they were, they have the
    same bits as before.
    """
    keys_by_shard: dict[str, list[str]] = {}
    for key in needed:
        if key in cache.index:
            keys_by_shard.setdefault(cache.index[key], []).append(key)
    damaged: list[tuple[str, str]] = []
    for found in distributed.gather_objects(_check(cache, keys_by_shard, threads)):
        damaged += found
    if not damaged:
        return
    if distributed.is_main():
        shards = sorted({shard for shard, _ in damaged})
        LOG.warning(
            "features in %s have no checksums (an older version's) or differ from them; "
            "%d shards with %d clips are made again: %s%s",
            cache.folder,
            len(shards),
            len(damaged),
            ", ".join(shards[:3]),
            ", ..." if len(shards) > 3 else "",
        )
        if os.access(cache.folder, os.W_OK):
            cache.remove(damaged)
    distributed.barrier()
    cache.forget(damaged)


def _check(
    cache: FeatureCache, keys_by_shard: dict[str, list[str]], threads: int
) -> list[tuple[str, str]]:
    """Return shard and key of the entries in damaged shards, of this process's share of shards."""
    shards: list[str] = []
    size = 0
    for shard in sorted(keys_by_shard)[distributed.rank() :: distributed.world_size()]:
        size += (cache.folder / shard).stat().st_size
        if size <= CHECKED_AT_START:
            shards.append(shard)
    damaged: list[tuple[str, str]] = []
    with ThreadPoolExecutor(max(1, threads)) as pool:
        keys = (keys_by_shard[shard] for shard in shards)
        for shard, is_good in zip(shards, pool.map(cache.check, shards, keys), strict=True):
            if not is_good:
                damaged += [(shard, key) for key in keys_by_shard[shard]]
    return damaged


def _missing(cache: FeatureCache, needed: Collection[str]) -> list[str]:
    """Return the keys that are missing as the main process sees it: other runs may be adding.

    Raises:
        CacheError: some are, and the folder cannot be written to.
    """
    missing = [key for key in needed if key not in cache.index]
    missing = distributed.gather_objects(missing)[0]
    if missing and not os.access(cache.folder, os.W_OK):
        raise CacheError(
            f"{cache.folder} lacks the features of {len(missing)} of {len(needed)} clips, and "
            "cannot be written to; expected a cache that is complete, or a folder that can be "
            "written to. Fill it where it can be (avllm data encode), or give another data.cache",
            reason="read_only",
        )
    return missing


def _limit(
    cache: FeatureCache,
    needed: Iterable[str],
    done: Filled,
    missing: int,
    max_bytes: int | None,
) -> None:
    """Delete shards until the ``missing`` clips fit; all processes raise together if they cannot.

    Args:
        cache: that is filled.
        needed: keys that the run needs.
        done: what this process wrote so far; the size of the rest is estimated from it.
        missing: clips that the cache lacked, those done so far among them.
        max_bytes: of all shards; None = no limit.
    """
    if max_bytes is None:
        return
    size = 0
    clips = 0
    for shard_size, shard_clips in distributed.gather_objects((done.size, done.encoded)):
        size += shard_size
        clips += shard_clips
    refusal: CacheError | None = None
    if distributed.is_main():
        cache.read_index()
        incoming = round(size / clips * max(0, missing - clips)) if clips else 0
        shards = cache.shards(needed)
        try:
            deleted = make_room(cache.folder, cache.mark_in_use(), shards, incoming, max_bytes)
            if deleted:
                LOG.info("deleted %d shards used longest ago from %s", len(deleted), cache.folder)
        except CacheError as error:
            refusal = error
    refusal = distributed.gather_objects(refusal)[0]
    if refusal is not None:
        raise refusal


def _settle(
    cache: FeatureCache,
    needed: Collection[str],
    failed: dict[str, MediaError | RowError],
) -> None:
    """Share the failures of all processes, and check that every other clip is in the cache."""
    all_failed: dict[str, MediaError | RowError] = {}
    for failed_there in distributed.gather_objects(failed):
        all_failed |= failed_there
    cache.failed = {n: all_failed[key] for n, key in cache.keys.items() if key in all_failed}
    distributed.barrier()
    cache.read_index()
    lost = [key for key in needed if key not in cache.index and key not in all_failed]
    if lost:
        raise CacheError(
            f"{len(lost)} of {len(needed)} clips were deleted from {cache.folder} while it was "
            "filled, perhaps by another run that made room in it. Start again, or give another "
            "data.cache",
            reason="lost",
        )


def encode(
    clips: list[Prepared],
    encoders: nn.ModuleDict,
    device: torch.device,
) -> list[Prepared]:
    """Return prepared clips with features instead of inputs, on the CPU."""
    encoded: list[Prepared] = [{} for _ in clips]
    for stream, encoder in encoders.items():
        items = [clip.get(stream) for clip in clips]
        if all(item is None for item in items):
            continue
        layers = encoder.encode(gather_stream(stream, items).to(device))  # type: ignore[operator]
        for number, item in enumerate(items):
            if item is None:
                continue
            t, p = item.mask.shape
            # (T, P, D) of each layer
            features = {name: tokens.x[number, :t, :p].cpu() for name, tokens in layers.items()}
            encoded[number][stream] = replace(item, inputs={}, features=features)
    return encoded
