"""Account for a filled feature cache: what it saves, and what reading it costs."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from itertools import islice

from avllm.data.cache.disk import gigabytes
from avllm.data.cache.store import FeatureCache, place_name
from avllm.data.reading import Place
from avllm.log import logger

LOG = logger(__name__)
SAMPLED_CLIPS = 8  # clips that are read to measure what reading costs


def account(cache: FeatureCache, places: Iterable[Place]) -> str:
    """Describe a cache filled with these places in one line.

    It names the hit rate, the size, what reading costs, and the time it saves, as measured when the
    features were made. A cache that costs more time than it saves gets a warning.
    """
    done = cache.filled
    keys = {key for name, key in cache.keys.items() if name not in cache.failed}
    shards = [cache.index[key] for key in keys]
    size = sum((cache.folder / name).stat().st_size for name in set(shards))
    costs = [cache.costs[shard] for shard in shards if shard in cache.costs]
    decoding = _mean([cost.decoding for cost in costs])
    encoding = _mean([cost.encoding for cost in costs])
    reading = _seconds_to_read(cache, places)
    if costs and reading > decoding + encoding:
        LOG.warning(
            "reading a clip's features takes %.1f ms, making them %.1f ms: the cache costs time. "
            "Leave out data.cache, put it on a faster disk, or keep less (data.cache_dtype)",
            1000 * reading,
            1000 * (decoding + encoding),
        )
    hit_rate = done.cached / max(1, done.needed)
    return (
        f"features of {done.needed} clips ({gigabytes(size)}): {done.cached} were in the cache "
        f"({hit_rate:.1%}), the others took {done.seconds:.1f} s; each epoch saves "
        f"{len(keys) * decoding:.1f} s of decoding and {len(keys) * encoding:.1f} s of encoding, "
        f"and reads for {len(keys) * reading:.1f} s"
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


def _seconds_to_read(cache: FeatureCache, places: Iterable[Place]) -> float:
    """Measure the mean time to read a clip's features, over the first few clips."""
    readable = (place for place in places if place_name(place) not in cache.failed)
    sampled = list(islice(readable, SAMPLED_CLIPS))
    began = time.perf_counter()
    for place in sampled:
        cache.get(place)
    return (time.perf_counter() - began) / max(1, len(sampled))
