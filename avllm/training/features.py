"""Features of frozen encoders out of a folder: for a run that is about to start, or beforehand."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from accelerate import Accelerator

from avllm import distributed
from avllm.config import RunConfig
from avllm.data.cache.fill import (
    CacheEngine,
    CacheError,
    ClipEncoding,
    FeatureCache,
    account,
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
    """Compute the features that the run needs and the cache lacks, and let the datasets read them; nothing without a
    cache.

    Args:
        engine: computes them; None = this process.
        processes: that train; None = as many as are here.

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
    max_bytes = None if data.cache_max_gb is None else round(data.cache_max_gb * 1e9)
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
    """The media of the items that a run draws in all its steps, those before a resume point too, and validates on."""
    order = order_of(config, training.items, processes)
    train = config.train
    drawn = steps_of(config, order, processes) * train.batch_size * train.accumulate * processes
    found: list[tuple[SampleDataset, np.ndarray | None]] = [(training, order.drawn_items(drawn))]
    if validation is not None:
        found.append(
            (validation, np.arange(len(validation)) < (train.validate_rows or len(validation))),
        )
    return MediaPlaces(found)


def encode_stage(
    config: RunConfig,
    accelerator: Accelerator,
    ray_workers: int = 0,
    gpus: float = 0.0,
    processes: int | None = None,
) -> FeatureCache:
    """Fill a stage's cache without training it; also as one of several processes, or with Ray.

    Args:
        ray_workers: actors of Ray that decode and encode; 0 = without Ray.
        gpus: of each of them.
        processes: that will train, which decides what is drawn in ``max_steps``; None = as many as are here.

    Raises:
        CacheError: the stage has no cache, an encoder trains, the features are more than ``data.cache_max_gb``, or
            Ray is not installed.
        RuleError: the rules of ``trainable`` do not fit the parameters.
    """
    if config.data.cache is None:
        raise CacheError(
            "the stage has no cache to fill; expected data.cache=FOLDER in the preset or behind its name",
        )
    if ray_workers:
        _check_ray()
    parts = build_parts(config)
    apply_rules(
        Task(parts.model, config.objectives),
        config.trainable,
    )  # tells which encoders train
    training, validation = build_datasets(config, parts)
    engine: CacheEngine | None = None
    if ray_workers:
        from avllm.training.features_ray import encode_on_ray

        config.train.precision = precision_of(
            accelerator,
        )  # "auto" could be another one on an actor's hardware
        engine = partial(encode_on_ray, config, parts, ray_workers, gpus)
    cache = use_cache(config, parts, training, validation, accelerator, engine, processes)
    assert cache is not None
    return cache


def _check_ray() -> None:
    """Before anything is loaded."""
    if distributed.world_size() > 1:
        raise CacheError(
            f"--engine ray is given to {distributed.world_size()} processes of a launcher; Ray starts its own "
            "(--workers). Expected one process, without torchrun"
        )
    import_ray(CacheError)


def summary(cache: FeatureCache) -> dict[str, object]:
    """What filling did on all processes, JSON-able; ``failed`` tells for each clip that could not be read why."""
    done, folder = cache.filled, Path(cache.folder)
    unreadable = {cache.keys[place] for place in cache.failed}
    return {
        "folder": str(folder),
        "wanted": done.needed,
        "found": done.cached,
        "encoded": done.needed - done.cached - len(unreadable),
        "seconds": round(done.seconds, 3),
        "bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        "failed": {place.partition("|")[2]: str(error) for place, error in cache.failed.items()},
    }
