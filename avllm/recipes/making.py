"""Run recipes that make data: independent tasks, shard by shard, on this machine or with Ray.

A job plans its tasks once (``job/tasks.jsonl``) and makes each shard of them in a separate folder,
which takes its name when it is whole::

    OUTPUT/job/run.json                 the settings that the work belongs to
    OUTPUT/job/tasks.jsonl              the plan, one task a line
    OUTPUT/job/answers/*.jsonl          the answers of a text model
    OUTPUT/shards/shard-00000/          items.jsonl (rows and drops, in order) and the shard's media

Started again after a kill, it goes on with the shards that are not there. A shard follows from its
tasks alone, so that neither the number of workers nor the engine changes a byte. A shard that
lacked media (drops ``missing_media`` and ``empty_media``) is made again when one of them is there.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from avllm.data.store.append_only import AppendOnly, LockedError, write_whole
from avllm.log import logger
from avllm.on_ray import Engine, Gpus
from avllm.recipes.captioned import file_digest
from avllm.recipes.readers import RecipeError
from avllm.recipes.rows import Drop, RecipeRow
from avllm.recipes.shards import (
    JOB,
    TASKS,
    MakingJob,
    Shard,
    cut_shards,
    read_shard,
    reopen_shards,
)
from avllm.recipes.workers import MakingError, Work, make_with_processes, make_with_ray

__all__ = [
    "JOB",
    "AnswersFolder",
    "Engine",
    "Gpus",
    "MakingError",
    "MakingJob",
    "ManifestName",
    "Seed",
    "SetName",
    "Shard",
    "ShardSize",
    "SplitName",
    "Workers",
    "make",
    "named",
    "settings_of",
]

LOG = logger(__name__)
SAY_EVERY = 10.0  # seconds
JobT = TypeVar("JobT", bound=MakingJob)

Workers = Annotated[
    int, typer.Option(min=1, help="Processes that make shards; they change the time, not the data.")
]
SetName = Annotated[
    str,
    typer.Option(
        "--name",
        help="`source`, and beginning of each id. Default: ids with a hash of all options.",
    ),
]
ManifestName = Annotated[str, typer.Option(help="The manifest in SOURCE.")]
Seed = Annotated[int, typer.Option(min=0, help="All that is random follows from it.")]
SplitName = Annotated[str, typer.Option(help="Name of the manifest that is made.")]
AnswersFolder = Annotated[
    str, typer.Option(help="Folder of a text model's answers that several outputs share.")
]
ShardSize = Annotated[int, typer.Option(min=1, help="Tasks in a shard: what a kill can lose.")]


def settings_of(job: Any, *read: Path) -> dict[str, Any]:
    """Return all that decides the bytes a job makes.

    Args:
        job: a dataclass, whose fields are the options.
        read: the files that the job reads; their hashes count.
    """
    digests = [file_digest(path) for path in read]
    return {"job": type(job).__name__, **asdict(job), "sha256": digests}


def named(job: JobT, name: str, word: str) -> JobT:
    """Return the job with a name, with which all ids begin.

    A name that the user gives becomes the ``source`` of the rows, too. Without one it is the word
    and a hash of all that decides what is made (the places of files do not), so that ids of two
    outputs are the same only where the rows are.

    Args:
        job: a dataclass with the fields ``name`` and ``source``.
        name: given by the user, or "".
        word: the recipe's.

    Raises:
        RecipeError: ``bad_name`` for a file; or a file that the job reads is not there.
    """
    if name:
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise RecipeError(
                f"--name {name!r}; expected letters, digits, and _ . - after the first of them",
                reason="bad_name",
            )
        return replace(job, name=name, source=name)  # type: ignore[type-var]
    facts = {key: value for key, value in job.settings.items() if not isinstance(value, Path)}
    digits = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
    return replace(job, name=f"{word}-{digits}")  # type: ignore[type-var]


def make(
    job: MakingJob,
    output: Path,
    *,
    engine: str = "local",
    workers: int = 1,
    shard_size: int = 32,
    gpus: float = 0.0,
) -> Iterator[RecipeRow | Drop]:
    """Do the work that is not done, and yield all rows and drops in the order of the plan.

    Args:
        job: what is made.
        output: the folder of the work. With Ray on several machines it lies, as the source and the
            recipe itself, on a file system that all of them see.
        engine: ``local`` or ``ray``.
        workers: processes. Each holds its own text model.
        shard_size: tasks in a shard.
        gpus: of each worker, with Ray, which hides them from workers that ask for none.

    Raises:
        MakingError: ``unknown_engine``, ``locked`` by another process, ``other_settings`` or
            ``broken_settings`` of the work in the folder, ``worker_died``; or Ray is not installed.
    """
    if engine not in ("local", "ray"):
        raise MakingError(f"engine {engine!r}; expected local or ray", reason="unknown_engine")
    (output / "shards").mkdir(parents=True, exist_ok=True)
    with _locked(output / JOB / "lock.jsonl"):
        _claim(output, {**job.settings, "shard_size": shard_size})
        _plan(job, output)
        work = Work(job, list(cut_shards(output, shard_size)))
        reopen_shards(work.shards)
        yield from _planned_drops(output)
        if engine == "ray":
            numbers = make_with_ray(work, workers, gpus)
        else:
            numbers = make_with_processes(work, workers)
        for number in _log_progress(numbers, work):
            yield from read_shard(work.shards[number])


def _log_progress(numbers: Iterator[int], work: Work) -> Iterator[int]:
    """Pass numbers of shards on, and log now and then how long the rest may take."""
    total = len(work.shards)
    before = sum(shard.whole.is_dir() for shard in work.shards)
    if before:
        LOG.info("%d of %d shards are there", before, total)
    began = time.monotonic()
    last_log = began
    for count, number in enumerate(numbers, start=1):
        now = time.monotonic()
        if count > before and now - last_log >= SAY_EVERY:
            left = (now - began) / (count - before) * (total - count)
            LOG.info("%d of %d shards, about %.0f min left", count, total, left / 60)
            last_log = now
        yield number


def _locked(path: Path) -> AppendOnly:
    try:
        return AppendOnly(path)
    except LockedError as error:
        raise MakingError(
            f"another process is at the work in {path.parents[1]}; let it end, or stop it",
            reason="locked",
        ) from error


def _claim(output: Path, settings: dict[str, Any]) -> None:
    """Write the settings of the work down, or compare them with those of the work in the folder."""
    path = output / JOB / "run.json"
    settings = json.loads(json.dumps(settings, default=str))
    if not path.is_file() or not path.with_name(TASKS).is_file():  # without a plan, no work yet
        write_whole(path, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
        return
    last_settings = _read_settings(path)
    keys = sorted({*last_settings, *settings})
    differing = [key for key in keys if last_settings.get(key) != settings.get(key)]
    if differing:
        # A name that the user did not give follows from the other settings.
        named_keys = [key for key in differing if key != "name"] or differing
        raise MakingError(
            f"{output} holds work of other settings: {', '.join(named_keys)} differ "
            f"({JOB}/{path.name} has them). Choose another folder, or delete this one to begin "
            "again",
            reason="other_settings",
        )


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MakingError(
            f"{path} cannot be read ({error}); delete the folder {path.parents[1]} to begin again",
            reason="broken_settings",
        ) from error
    if not isinstance(settings, dict):
        raise MakingError(
            f"{path} holds a {type(settings).__name__}; delete the folder {path.parents[1]} "
            "to begin again",
            reason="broken_settings",
        )
    return settings


def _plan(job: MakingJob, output: Path) -> None:
    """Write the plan, once: it may be costly to make, and must not change between two starts."""
    path = output / JOB / TASKS
    if path.is_file():
        return
    drops_path = path.with_name("drops.jsonl")
    partial = path.with_name(f"{path.name}.partial")
    partial_drops = path.with_name(f"{drops_path.name}.partial")
    with (
        partial.open("w", encoding="utf-8") as tasks,
        partial_drops.open("w", encoding="utf-8") as drops,
    ):
        for item in job.plan():
            if isinstance(item, Drop):
                drops.write(json.dumps(asdict(item), ensure_ascii=False) + "\n")
            else:
                tasks.write(json.dumps(item, ensure_ascii=False) + "\n")
    partial_drops.replace(drops_path)
    partial.replace(path)  # the tasks last: with them the plan is whole


def _planned_drops(output: Path) -> Iterator[Drop]:
    with (output / JOB / "drops.jsonl").open(encoding="utf-8") as file:
        for line in file:
            yield Drop(**json.loads(line))
