"""Features of frozen encoders out of a folder: for a run that is about to start, or beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator

from avllm import distributed
from avllm.config import RunConfig
from avllm.data.cache import CacheError, FeatureCache, account, fill, recipe
from avllm.data.dataset import SampleDataset
from avllm.log import logger
from avllm.training.optim import apply_rules
from avllm.training.start import Parts, build_dataset, build_parts
from avllm.training.task import Task

LOG = logger(__name__)


def use_cache(
    config: RunConfig, parts: Parts, datasets: Sequence[SampleDataset], accelerator: Accelerator
) -> FeatureCache | None:
    """Compute the features of all media that the cache lacks, and let the datasets read them; nothing without a cache.

    Raises:
        CacheError: an encoder trains, or the features are more than ``data.cache_max_gb``.
    """
    data = config.data
    if data.cache is None:
        return None
    made_by = recipe(parts.processor, parts.model.encoders, config.train.precision, data.cache_dtype)
    cache = FeatureCache(data.cache, made_by)
    places = [place for dataset in datasets for place in dataset.places()]
    fill(
        cache,
        places,
        datasets[0].prepare,
        parts.model.encoders,
        device=accelerator.device,
        num_workers=data.num_workers,
        autocast=accelerator.autocast,
        max_bytes=None if data.cache_max_gb is None else round(data.cache_max_gb * 1e9),
    )
    for dataset in datasets:
        dataset.cache = cache
    if distributed.is_main():
        LOG.info(account(cache, places))
    return cache


def encode_stage(config: RunConfig, accelerator: Accelerator) -> FeatureCache:
    """Fill a stage's cache without training it; also as one of several processes.

    Raises:
        CacheError: the stage has no cache, an encoder trains, or the features are more than ``data.cache_max_gb``.
        RuleError: the rules of ``trainable`` do not fit the parameters.
    """
    if config.data.cache is None:
        raise CacheError("the stage has no cache to fill; expected data.cache=FOLDER in the preset or behind its name")
    parts = build_parts(config)
    apply_rules(Task(parts.model, config.objectives), config.trainable)  # tells which encoders train
    sources = [s for s in (config.data.train, config.data.validation) if s]
    cache = use_cache(config, parts, [build_dataset(config, s, parts) for s in sources], accelerator)
    assert cache is not None
    return cache


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
