"""Make the shards of a job in this process, in processes of this machine, or with Ray."""

from __future__ import annotations

import importlib.util
import inspect
import multiprocessing
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from avllm.on_ray import run_on_ray
from avllm.recipes.readers import RecipeError
from avllm.recipes.shards import MakingJob, Shard, make_shard


class MakingError(RecipeError):
    """Work that cannot go on: the folder belongs to other work, or the engine is not there."""


@dataclass(frozen=True)
class Work:
    """A job and the shards that its plan is cut into."""

    job: MakingJob
    shards: list[Shard]

    def make(self, number: int) -> int:
        """Make a shard unless it is whole, and return its number."""
        shard = self.shards[number]
        if not shard.whole.is_dir():
            make_shard(self.job, shard)
        return number


def make_with_processes(work: Work, workers: int) -> Iterator[int]:
    """Make the shards on this machine, and yield their numbers in order.

    Args:
        work: what is made.
        workers: processes; with one, this process does the work itself.

    Raises:
        MakingError: ``worker_died``.
    """
    numbers = range(len(work.shards))
    if workers <= 1:
        yield from map(work.make, numbers)
        return
    # Spawned: a forked process inherits locks and threads of the decoders in an unknown state.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=_take_work, initargs=(work,)
    ) as pool:
        futures: list[Future[int]] = [pool.submit(_make_taken, number) for number in numbers]
        try:
            for future in futures:
                yield future.result()
        except BrokenProcessPool as error:
            raise MakingError(
                "a worker process died: out of memory, or by a bug of a decoder. What is made is "
                "kept; start again, with fewer --workers where memory was short. If it dies again, "
                "`avllm data check` names the file",
                reason="worker_died",
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_work_of_process: list[Work] = []
"""The work of a worker process, which gets it once instead of with every shard."""


def _take_work(work: Work) -> None:
    _work_of_process[:] = [work]


def _make_taken(number: int) -> int:
    return _work_of_process[0].make(number)


@dataclass(frozen=True)
class DescribedJob:
    """A job by its file, class name and fields, which reaches processes that did not run the file.

    A recipe is a file that is run, so that pickle knows its classes by no name that other processes
    could import.
    """

    file: str
    name: str
    values: dict[str, Any]

    @classmethod
    def of(cls, job: MakingJob) -> DescribedJob:
        """Describe a job."""
        names = [field.name for field in fields(job)]  # type: ignore[arg-type]
        values = {name: getattr(job, name) for name in names}
        return cls(inspect.getfile(type(job)), type(job).__name__, values)

    def build(self) -> MakingJob:
        """Build the job out of its file."""
        spec = importlib.util.spec_from_file_location(
            f"avllm_job_{Path(self.file).stem}", self.file
        )
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look themselves up there
        spec.loader.exec_module(module)
        return getattr(module, self.name)(**self.values)


class _RayMaker:
    """The work of one Ray actor: the job arrives once, then numbers of shards."""

    def __init__(self, job: DescribedJob, shards: list[Shard]) -> None:
        self.work = Work(job.build(), shards)

    def __call__(self, number: int) -> int:
        try:
            return self.work.make(number)
        except RecipeError as error:
            raise MakingError(str(error)) from error


def make_with_ray(work: Work, workers: int, gpus: float) -> Iterator[int]:
    """Make the shards with Ray, and yield their numbers in order.

    Args:
        work: what is made.
        workers: actors.
        gpus: of each actor.
    """
    yield from run_on_ray(
        _RayMaker,
        (DescribedJob.of(work.job), work.shards),
        range(len(work.shards)),
        workers=workers,
        gpus=gpus,
        refusal=MakingError,
    )
