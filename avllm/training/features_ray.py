"""Encode a stage's features on Ray: actors hold its encoders, shards are the tasks."""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from torch import nn

from avllm.config import RunConfig
from avllm.data.cache.fill import CacheError, ClipEncoding, FeatureCache, Filled, encode_places
from avllm.data.cache.store import place_name
from avllm.data.reading import MediaReader, Place
from avllm.models.processing_avllm import AVProcessor
from avllm.on_ray import run_on_ray
from avllm.training.accelerator import make_accelerator
from avllm.training.start import Parts


@dataclass(frozen=True)
class ShardTask:
    """Name the media parts of one shard and their keys in the cache."""

    places: Sequence[Place]
    keys: dict[str, str]


def encode_on_ray(
    config: RunConfig,
    parts: Parts,
    workers: int,
    gpus: float,
    cache: FeatureCache,
    places: Sequence[Place],
    batch_size: int,
) -> Generator[Filled, None, None]:
    """Encode media parts into the cache as :func:`avllm.data.cache.fill.encode_places` does.

    The shards are cut as a single process cuts them, and the encoders travel with their weights: on
    devices of one kind the files have the same bytes. With several machines, the manifests, the
    media and the cache have to lie on a file system that all of them see.

    Args:
        config: the stage.
        parts: its model and processor.
        workers: actors, each with the encoders.
        gpus: of each actor; 0 = they encode on CPUs.
        cache: the cache that the features are added to.
        places: media parts that the cache lacks.
        batch_size: media parts in a shard.

    Raises:
        CacheError: Ray is not installed.
    """
    rest = iter(places)
    tasks: list[ShardTask] = []
    for _ in range(0, len(places), batch_size):
        shard = list(islice(rest, batch_size))
        keys = {place_name(place): cache.key(place) for place in shard}
        tasks.append(ShardTask(shard, keys))
    arguments = (
        config,
        parts.model.encoders,
        parts.processor,
        cache.for_writing(),
        torch.get_num_threads(),
        os.getcwd(),
    )
    # With a limit on the cache, the size of the first shard decides whether a second is begun.
    first = len(tasks) if config.data.cache_max_gb is None else 1
    for some in (tasks[:first], tasks[first:]):
        yield from run_on_ray(
            _Encode, arguments, some, workers=workers, gpus=gpus, refusal=CacheError
        )


class _Encode:
    """Encode shards in an actor, which receives encoders and processor once."""

    def __init__(
        self,
        config: RunConfig,
        encoders: nn.ModuleDict,
        processor: AVProcessor,
        cache: FeatureCache,
        threads: int,
        folder: str,
    ) -> None:
        os.chdir(folder)  # so that relative paths name the same files
        torch.set_num_threads(threads)  # the order of sums depends on it, and Ray would set 1
        self.cache = cache
        accelerator = make_accelerator(config, Path(config.output))
        self.encoding = ClipEncoding(
            MediaReader(processor).inputs,
            encoders,
            accelerator.device,
            autocast=accelerator.autocast,
        )

    def __call__(self, task: ShardTask) -> Filled:
        self.cache.keys = task.keys
        encoding = replace(self.encoding, batch_size=len(task.places))
        (report,) = encode_places(self.cache, task.places, encoding)
        return report
