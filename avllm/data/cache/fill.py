"""Features of frozen encoders, computed once: nothing is decoded or encoded a second time.

An entry is content-addressed: file hash, interval, preparation of frames and sound, the encoders' weights and options,
and the dtype make up its key, so that any of them changing is a miss and never a wrong hit. Entries lie in safetensors
shards, each written whole or not at all; the shards' own headers are the index.

What a run lacks is computed before its first step (each clip once, as a first epoch would), or beforehand by
``avllm data encode``; so all epochs read the same bits, also those of a run that was killed and goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from rich.progress import track
from torch import nn

from avllm import distributed
from avllm.data.cache.disk import CacheError, gigabytes, make_room, touch
from avllm.data.cache.hashes import Hashes
from avllm.data.cache.store import FeatureCache, Filled, place_name, recipe
from avllm.data.collate import gather_stream
from avllm.data.media.load import MediaError
from avllm.data.reading import Place, Prepare, Prepared, read_batches
from avllm.data.schema import RowError, resolve
from avllm.log import logger

__all__ = [
    "CacheEngine",
    "CacheError",
    "FeatureCache",
    "Filled",
    "account",
    "encode",
    "encode_places",
    "fill",
    "recipe",
]

LOG = logger(__name__)
CacheEngine = Callable[[FeatureCache, Sequence[Place], int], Generator[Filled, None, None]]
"""Encodes media parts into a cache, a number of them a shard, and says what became of each shard."""
SAMPLED = 8  # clips that are read to measure what reading costs


def fill(
    cache: FeatureCache,
    places: Sequence[Place],
    prepare: Prepare,
    encoders: nn.ModuleDict,
    *,
    device: torch.device,
    num_workers: int = 0,
    batch_size: int = 32,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    max_bytes: int | None = None,
    engine: CacheEngine | None = None,
) -> int:
    """Decode and encode what the cache does not hold yet, shared out over the processes.

    Args:
        cache: to be filled.
        places: media parts; repeated ones count once.
        prepare: decodes media parts and prepares them for the encoders.
        encoders: frozen, by stream.
        device: that they run on.
        num_workers: processes that decode.
        batch_size: clips encoded at once and written as one shard.
        autocast: the precision that training runs in.
        max_bytes: of all shards in the folder; those used longest ago leave. None = no limit.
        engine: encodes what is missing; None = this process.

    Returns:
        how many clips this process encoded; ``cache.filled`` tells more.

    Raises:
        CacheError: what this run needs is more than ``max_bytes``; told after the first shard, by which the rest is
            judged, or at the end.
    """
    began, needed = time.perf_counter(), _share_keys(cache, places, num_workers)
    missing = _claim(cache, needed)
    mine = _Chosen(places, [needed[key] for key in missing[distributed.rank() :: distributed.world_size()]])
    if missing:
        LOG.info("encoding %d of %d clips into %s", len(missing), len(needed), cache.folder)
    how: dict[str, Any] = {"device": device, "num_workers": num_workers, "batch_size": batch_size, "autocast": autocast}
    shards = engine(cache, mine, batch_size) if engine else encode_places(cache, mine, prepare, encoders, **how)
    done, rest = Filled(len(needed), len(needed) - len(missing)), -(-len(mine) // batch_size) - 1
    with closing(shards):
        done.add(next(shards, Filled()))  # its size tells how much the rest will take
        _limit(cache, needed, done, len(missing), max_bytes)
        for shard in track(shards, "features", total=rest, disable=not (rest > 0 and distributed.is_main())):
            done.add(shard)
    _settle(cache, needed, done.failed)
    _limit(cache, needed, done, 0, max_bytes)
    done.seconds = time.perf_counter() - began
    cache.filled = done
    return done.encoded


def encode_places(
    cache: FeatureCache,
    places: Sequence[Place],
    prepare: Prepare,
    encoders: nn.ModuleDict,
    *,
    device: torch.device,
    num_workers: int = 0,
    batch_size: int = 32,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Generator[Filled, None, None]:
    """Encode media parts into the cache shard by shard, whatever it holds: the work of one process, of any engine."""
    encoders.to(device).eval()
    for loaded in read_batches(places, prepare, batch_size, num_workers):
        good = {one.number: one.found for one in loaded if isinstance(one.found, dict)}
        failed = {cache.key(places[one.number]): one.found for one in loaded if not isinstance(one.found, dict)}
        began = time.perf_counter()
        with torch.no_grad(), autocast():
            encoded = encode(list(good.values()), encoders, device)
        each = (time.perf_counter() - began) / max(1, len(good))
        decoding = sum(one.seconds for one in loaded if one.number in good) / max(1, len(good))
        clips = {cache.key(places[n]): clip for n, clip in zip(good, encoded, strict=True)}
        yield Filled(encoded=len(clips), size=cache.put(clips, decoding, each) if clips else 0, failed=failed)


@dataclass
class _Chosen(Sequence[Place]):
    """Some of many media parts, which may be read only when they are asked for."""

    places: Sequence[Place]
    numbers: list[int]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, number: int) -> Place:  # type: ignore[override]
        return self.places[self.numbers[number]]


def _share_keys(cache: FeatureCache, places: Sequence[Place], threads: int) -> dict[str, int]:
    """Hash the files, each process its share; the keys of all, with the number of the first part that has each."""
    names: dict[str, str] = {}
    first: dict[str, int] = {}
    rank, count = distributed.rank(), distributed.world_size()
    mine = range(len(places) * rank // count, len(places) * (rank + 1) // count)  # intervals of a file stay together
    hashes = Hashes(cache.folder)
    hashes.look((resolve(part, root) for root, part in map(places.__getitem__, mine)), threads, distributed.is_main())
    for number in mine:
        place = places[number]
        key = names[place_name(place)] = cache.key(place, hashes[resolve(place[1], place[0])])
        first.setdefault(key, number)
    needed: dict[str, int] = {}
    for their_names, theirs in distributed.gather_objects((names, first)):
        cache.keys |= their_names
        for key, number in theirs.items():
            needed[key] = min(number, needed.get(key, number))
    return dict(sorted(needed.items(), key=lambda item: item[1]))


def _claim(cache: FeatureCache, needed: Iterable[str]) -> list[str]:
    """Hold the shards that are there, so that no other run deletes them; the keys that are missing, as the main
    process sees it: others may be adding to the folder.
    """
    missing: list[str] = []
    if distributed.is_main():
        assert cache.use
        cache.read_index()
        touch(cache.folder, cache.shards(needed))
        missing = [key for key in needed if key not in cache.index]
    missing = distributed.gather_objects(missing)[0]
    cache.read_index()
    return missing


def _limit(cache: FeatureCache, needed: Iterable[str], done: Filled, missing: int, max_bytes: int | None) -> None:
    """Make room for the clips that are ``missing`` (those done so far among them), judged by those done; all processes
    refuse together.
    """
    if max_bytes is None:
        return
    parts = distributed.gather_objects((done.size, done.encoded))
    size, clips = sum(s for s, _ in parts), sum(n for _, n in parts)
    refused: CacheError | None = None
    if distributed.is_main():
        cache.read_index()
        wanted = round(size / clips * max(0, missing - clips)) if clips else 0
        try:
            gone = make_room(cache.folder, cache.use, cache.shards(needed), wanted, max_bytes)
            if gone:
                LOG.info("%d shards that were used longest ago left %s", len(gone), cache.folder)
        except CacheError as error:
            refused = error
    refused = distributed.gather_objects(refused)[0]
    if refused is not None:
        raise refused


def _settle(cache: FeatureCache, needed: Collection[str], failed: dict[str, MediaError | RowError]) -> None:
    everyones = {k: v for part in distributed.gather_objects(failed) for k, v in part.items()}
    cache.failed = {name: everyones[key] for name, key in cache.keys.items() if key in everyones}
    distributed.barrier()
    cache.read_index()
    lost = [key for key in needed if key not in cache.index and key not in everyones]
    if lost:
        raise CacheError(
            f"{len(lost)} of {len(needed)} clips have left {cache.folder} while it was filled; does another run make "
            "room in it? Start again, or give another data.cache"
        )


def account(cache: FeatureCache, places: Iterable[Place]) -> str:
    """One line about a cache filled with these places: hit rate, size, what reading costs, and what it saves of the
    time measured when the features were made.
    """
    done = cache.filled
    keys = {key for name, key in cache.keys.items() if name not in cache.failed}
    shards = [cache.index[key] for key in keys]
    costs = [cache.costs[shard] for shard in shards if shard in cache.costs]
    size = sum((cache.folder / name).stat().st_size for name in set(shards))
    tried = list(islice((place for place in places if place_name(place) not in cache.failed), SAMPLED))
    began = time.perf_counter()
    for place in tried:
        cache.get(place)
    reading = (time.perf_counter() - began) / max(1, len(tried))
    decoding, encoding = (sum(c[i] for c in costs) / max(1, len(costs)) for i in (0, 1))
    if costs and reading > decoding + encoding:
        LOG.warning(
            "reading a clip's features takes %.1f ms, making them %.1f ms: the cache costs time. Leave out data.cache, "
            "put it on a faster disk, or keep less (data.cache_dtype)",
            1000 * reading,
            1000 * (decoding + encoding),
        )
    return (
        f"features of {done.wanted} clips ({gigabytes(size)}): {done.found} were there "
        f"({done.found / max(1, done.wanted):.1%}), the others took {done.seconds:.1f} s; each epoch is spared "
        f"{len(keys) * decoding:.1f} s of decoding and {len(keys) * encoding:.1f} s of encoding, "
        f"and reads for {len(keys) * reading:.1f} s"
    )


def encode(clips: list[Prepared], encoders: nn.ModuleDict, device: torch.device) -> list[Prepared]:
    """Prepared clips -> the same with features instead of inputs, on the CPU."""
    found: list[Prepared] = [{} for _ in clips]
    for stream, encoder in encoders.items():
        items = [clip.get(stream) for clip in clips]
        if all(item is None for item in items):
            continue
        layers = encoder.encode(gather_stream(stream, items).to(device))  # type: ignore[operator]
        for number, item in enumerate(items):
            if item is not None:
                t, p = item.mask.shape
                features = {name: tokens.x[number, :t, :p].cpu() for name, tokens in layers.items()}  # (T, P, D)
                found[number][stream] = replace(item, inputs={}, features=features)
    return found
