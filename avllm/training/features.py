"""Features of frozen encoders out of a folder: for a run that is about to start, or beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from accelerate import Accelerator

from avllm import distributed
from avllm.config import RunConfig
from avllm.data.cache import CacheEngine, CacheError, FeatureCache, account, fill, recipe
from avllm.data.dataset import Places, SampleDataset
from avllm.data.on_ray import import_ray
from avllm.log import logger
from avllm.training.optim import apply_rules
from avllm.training.start import Parts, build_dataset, build_parts
from avllm.training.task import Task

LOG = logger(__name__)


def use_cache(
    config: RunConfig,
    parts: Parts,
    datasets: Sequence[SampleDataset],
    accelerator: Accelerator,
    engine: CacheEngine | None = None,
) -> FeatureCache | None:
    """Compute the features of all media that the cache lacks, and let the datasets read them; nothing without a cache.

    Args:
        engine: computes them; None = this process.

    Raises:
        CacheError: an encoder trains, or the features are more than ``data.cache_max_gb``.
    """
    data = config.data
    if data.cache is None:
        return None
    made_by = recipe(parts.processor, parts.model.encoders, config.train.precision, data.cache_dtype)
    cache = FeatureCache(data.cache, made_by)
    places = Places(datasets)
    fill(
        cache,
        places,
        datasets[0].prepare,
        parts.model.encoders,
        device=accelerator.device,
        num_workers=data.num_workers,
        autocast=accelerator.autocast,
        max_bytes=None if data.cache_max_gb is None else round(data.cache_max_gb * 1e9),
        engine=engine,
    )
    for dataset in datasets:
        dataset.cache = cache
    if distributed.is_main():
        LOG.info(account(cache, places))
    return cache


def encode_stage(config: RunConfig, accelerator: Accelerator, ray_workers: int = 0, gpus: float = 0.0) -> FeatureCache:
    """Fill a stage's cache without training it; also as one of several processes, or with Ray.

    Args:
        ray_workers: actors of Ray that decode and encode; 0 = without Ray.
        gpus: of each of them.

    Raises:
        CacheError: the stage has no cache, an encoder trains, the features are more than ``data.cache_max_gb``, or
            Ray is not installed.
        RuleError: the rules of ``trainable`` do not fit the parameters.
    """
    if config.data.cache is None:
        raise CacheError("the stage has no cache to fill; expected data.cache=FOLDER in the preset or behind its name")
    if ray_workers:
        _check_ray()
    parts = build_parts(config)
    apply_rules(Task(parts.model, config.objectives), config.trainable)  # tells which encoders train
    datasets = [build_dataset(config, "train", parts)]
    if config.data.validation:
        datasets.append(build_dataset(config, "validation", parts))
    engine: CacheEngine | None = None
    if ray_workers:
        from avllm.training.features_ray import encode_on_ray

        engine = partial(encode_on_ray, config, parts, ray_workers, gpus)
    cache = use_cache(config, parts, datasets, accelerator, engine)
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
        "wanted": done.wanted,
        "found": done.found,
        "encoded": done.wanted - done.found - len(unreadable),
        "seconds": round(done.seconds, 3),
        "bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        "failed": {place.partition("|")[2]: str(error) for place, error in cache.failed.items()},
    }
