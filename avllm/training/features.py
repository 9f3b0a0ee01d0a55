"""Fill a cache with the features of frozen encoders, before a run or at its start."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from accelerate import Accelerator

from avllm import distributed
from avllm.config import RunConfig
from avllm.data.cache.account import account
from avllm.data.cache.fill import (
    CacheEngine,
    CacheError,
    ClipEncoding,
    FeatureCache,
    fill,
    recipe,
)
from avllm.data.dataset import MediaPlaces, SampleDataset
from avllm.data.mixture import order_of, steps_of
from avllm.log import logger
from avllm.on_ray import import_ray
from avllm.training.accelerator import precision_of
from avllm.training.optim import apply_rules
from avllm.training.start import Parts, build_datasets, build_parts
from avllm.training.task import Task

LOG = logger(__name__)


def use_cache(
    config: RunConfig,
    parts: Parts,
    training: SampleDataset,
    validation: SampleDataset | None,
    accelerator: Accelerator,
    engine: CacheEngine | None = None,
    processes: int | None = None,
) -> FeatureCache | None:
    """Compute the features that the cache lacks and let the datasets read the cache.

    A run without ``data.cache`` returns None.

    Args:
        config: the stage.
        parts: its model and processor.
        training: the dataset of training.
        validation: the dataset of validation, if there is one.
        accelerator: gives device and precision.
        engine: computes the features; None = this process.
        processes: the number that will train; None = the number that run now.

    Raises:
        CacheError: an encoder trains, or the features are more than ``data.cache_max_gb``.
    """
    data = config.data
    if data.cache is None:
        return None
    made_by = recipe(
        parts.processor,
        parts.model.encoders,
        precision_of(accelerator),
        data.cache_dtype,
    )
    cache = FeatureCache(data.cache, made_by)
    places = needed(config, training, validation, processes or distributed.world_size())
    encoding = ClipEncoding(
        training.reader.inputs,
        parts.model.encoders,
        accelerator.device,
        num_workers=data.num_workers,
        autocast=accelerator.autocast,
    )
    max_bytes: int | None = None
    if data.cache_max_gb is not None:
        max_bytes = round(data.cache_max_gb * 1e9)
    fill(cache, places, encoding, max_bytes=max_bytes, engine=engine)
    for dataset in filter(None, (training, validation)):
        dataset.cache = cache
    if distributed.is_main():
        LOG.info(account(cache, places))
    return cache


def needed(
    config: RunConfig,
    training: SampleDataset,
    validation: SampleDataset | None,
    processes: int,
) -> MediaPlaces:
    """Return the media of all items that a run draws and validates on.

    The steps before a resume point count too.
    """
    order = order_of(config, training.items, processes)
    train = config.train
    items_per_step = train.batch_size * train.accumulate * processes
    drawn = steps_of(config, order, processes) * items_per_step
    drawn_items = order.drawn_items(drawn)
    items: list[tuple[SampleDataset, np.ndarray | None]] = [(training, drawn_items)]
    if validation is not None:
        is_read = np.zeros(len(validation), dtype=bool)
        is_read[validation.items.drawn_by_id(config.seed, train.validate_rows)] = True
        items.append((validation, is_read))
    return MediaPlaces(items)


def encode_stage(
    config: RunConfig,
    accelerator: Accelerator,
    ray_workers: int = 0,
    gpus: float = 0.0,
    processes: int | None = None,
) -> FeatureCache:
    """Fill a stage's cache without training it; also as one of several processes, or with Ray.

    Args:
        config: the stage.
        accelerator: gives device and precision.
        ray_workers: actors of Ray that decode and encode; 0 = without Ray.
        gpus: of each actor.
        processes: the number that will train, which decides what is drawn in ``max_steps``;
            None = the number that run now.

    Raises:
        CacheError: the stage has no cache, an encoder trains, the features are more than
            ``data.cache_max_gb``, or Ray is not installed.
        RuleError: the rules of ``trainable`` do not fit the parameters.
    """
    if config.data.cache is None:
        raise CacheError(
            "the stage has no cache to fill; expected data.cache=FOLDER in the preset or after "
            "its name"
        )
    if ray_workers:
        _check_ray()
    parts = build_parts(config)
    # The rules decide which encoders train: their features must not be cached.
    apply_rules(Task(parts.model, config.objectives), config.trainable)
    training, validation = build_datasets(config, parts)
    engine: CacheEngine | None = None
    if ray_workers:
        from avllm.training.features_ray import encode_on_ray

        # "auto" could be another precision on an actor's hardware.
        config.train.precision = precision_of(accelerator)
        engine = partial(encode_on_ray, config, parts, ray_workers, gpus)
    cache = use_cache(config, parts, training, validation, accelerator, engine, processes)
    assert cache is not None
    return cache


def _check_ray() -> None:
    """Check, before anything is loaded, that Ray can start its own processes."""
    if distributed.world_size() > 1:
        raise CacheError(
            f"--engine ray is given to {distributed.world_size()} processes of a launcher; Ray "
            "starts its own (--workers). Expected one process, without torchrun"
        )
    import_ray(CacheError)


def summary(cache: FeatureCache) -> dict[str, object]:
    """Return the counts of filling over all processes, JSON-able.

    ``failed`` gives the error of each clip that could not be read.
    """
    done = cache.filled
    folder = Path(cache.folder)
    unreadable = {cache.keys[place] for place in cache.failed}
    failed: dict[str, str] = {}
    for place, error in cache.failed.items():
        failed[place.partition("|")[2]] = str(error)
    return {
        "folder": str(folder),
        "wanted": done.needed,
        "found": done.cached,
        "encoded": done.needed - done.cached - len(unreadable),
        "seconds": round(done.seconds, 3),
        "bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        "failed": failed,
    }
