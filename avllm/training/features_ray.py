"""A stage's features on Ray: actors that were handed its encoders and its processor encode whole shards."""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from dataclasses import replace
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

Task = tuple[Sequence[Place], dict[str, str]]
"""The media parts of a shard and their keys."""


def encode_on_ray(
    config: RunConfig,
    parts: Parts,
    workers: int,
    gpus: float,
    cache: FeatureCache,
    places: Sequence[Place],
    batch_size: int,
) -> Generator[Filled, None, None]:
    """Encode media parts into the cache as :func:`avllm.data.cache.fill.encode_places` does, a shard a task.

    The shards are cut as one process here cuts them, and the encoders travel with their weights: on devices of one kind
    the files have the same bytes. On several machines the manifests, the media and the cache lie on a file system
    that all of them see.

    Args:
        config, parts: the stage.
        workers: actors, each with the encoders. gpus: of each; without, they encode on CPUs.
        cache: to be added to. places: what it lacks. batch_size: of them in a shard.

    Raises:
        CacheError: Ray is not installed.
    """
    starts, rest = range(0, len(places), batch_size), iter(places)
    cut = [list(islice(rest, batch_size)) for _ in starts]
    tasks: list[Task] = [(shard, {place_name(place): cache.key(place) for place in shard}) for shard in cut]
    given = (
        config,
        parts.model.encoders,
        parts.processor,
        cache.for_writing(),
        torch.get_num_threads(),
        os.getcwd(),
    )
    # With a limit on its size, what the first shard takes decides whether a second one is begun.
    first = len(tasks) if config.data.cache_max_gb is None else 1
    for some in (tasks[:first], tasks[first:]):
        yield from run_on_ray(_Encode, given, some, workers=workers, gpus=gpus, refusal=CacheError)


class _Encode:
    """The work of one actor: encoders and processor come once, shards come and go."""

    def __init__(
        self,
        config: RunConfig,
        encoders: nn.ModuleDict,
        processor: AVProcessor,
        cache: FeatureCache,
        threads: int,
        folder: str,
    ) -> None:
        os.chdir(folder)  # so that relative paths mean, and errors name, the same files
        torch.set_num_threads(threads)  # the order of sums follows from it, and Ray would set one
        self.cache = cache
        accelerator = make_accelerator(config, Path(config.output))
        self.encoding = ClipEncoding(
            MediaReader(processor).inputs,
            encoders,
            accelerator.device,
            autocast=accelerator.autocast,
        )

    def __call__(self, task: Task) -> Filled:
        places, self.cache.keys = task
        encoding = replace(self.encoding, batch_size=len(places))
        (report,) = encode_places(self.cache, places, encoding)
        return report
