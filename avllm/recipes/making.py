"""The engine of recipes that make data: independent tasks, shard by shard, on this machine or with Ray.

A job plans its tasks once (``job/tasks.jsonl``) and makes each shard of them in a folder of its own, which takes its
name when it is whole::

    OUTPUT/job/run.json                 what the work belongs to
    OUTPUT/job/tasks.jsonl              the plan, one task a line
    OUTPUT/job/answers/*.jsonl          what a text model answered
    OUTPUT/shards/shard-00000/          items.jsonl (rows and drops, in order) and the media that the shard made

Started again after a kill, it goes on with the shards that are not there. A shard follows from its tasks alone, so that
neither the number of workers nor the engine changes a byte. A shard that lacked media (drops ``missing_media`` and
``empty_media``) is made anew when one of them is there.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import multiprocessing
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

import typer

from avllm.data.store.append_only import AppendOnly, LockedError, write_whole
from avllm.log import logger
from avllm.on_ray import Engine as Engine  # for the recipes' signatures
from avllm.on_ray import Gpus as Gpus
from avllm.on_ray import run_on_ray
from avllm.recipes.captioned import file_digest
from avllm.recipes.frame import MEDIA, Drop, Row
from avllm.recipes.readers import EMPTY, MISSING, RecipeError, lacking

LOG = logger(__name__)
SAY_EVERY = 10.0  # seconds
JobT = TypeVar("JobT", bound="Job")
LACKS = "lacks.json"  # paths in a shard's folder: media that were not there when it was made
JOB = "job"  # the folder of what the work itself needs to go on
Workers = Annotated[int, typer.Option(min=1, help="Processes that make shards; they change the time, not the data.")]
SetName = Annotated[
    str,
    typer.Option(
        "--name", help="Stands in `source`, and in front of each id. Default: ids with a hash of all options."
    ),
]
ShardSize = Annotated[int, typer.Option(min=1, help="Tasks in a shard: what a kill can lose.")]


class MakingError(RecipeError):
    """Work that cannot go on: the folder belongs to other work, or the engine is not there."""


@dataclass(frozen=True)
class Shard:
    """Where a shard stands in the plan, and where its media are written.

    Attributes:
        number: from 0.
        start: byte of ``tasks.jsonl`` at which its tasks begin.
        count: tasks.
        output: the folder of the whole work.
    """

    number: int
    start: int
    count: int
    output: Path

    @property
    def name(self) -> str:
        """``shard-00000``."""
        return f"shard-{self.number:05d}"

    @property
    def whole(self) -> Path:
        """The folder when the shard is whole."""
        return self.output / "shards" / self.name

    @property
    def folder(self) -> Path:
        """The folder while it is made; media go in here."""
        return self.output / "shards" / f"{self.name}.partial"

    @property
    def answers(self) -> Path:
        """The folder of text models' answers."""
        return self.output / JOB / "answers"


def settings_of(job: Any, *read: Path) -> dict[str, Any]:
    """What decides the bytes that a job makes: its options, and the hashes of the files that it reads."""
    return {"job": type(job).__name__, **asdict(job), "sha256": [file_digest(path) for path in read]}


class Job(Protocol):
    """What is made: a dataclass of plain values, the same wherever it runs."""

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides what is made, JSON-able."""
        ...

    def plan(self) -> Iterator[dict[str, Any] | Drop]:
        """The tasks, JSON-able, and what is left out before there is a task."""
        ...

    def make(self, tasks: Sequence[dict[str, Any]], shard: Shard) -> Iterator[Row | Drop]:
        """Make a shard. Media paths of rows are absolute, or relative to ``shard.folder``."""
        ...


def named(job: JobT, given: str, word: str) -> JobT:
    """The job with its field ``name``, with which all ids begin, and ``source``, which its rows get.

    Without a given name it is the word and a hash of all that decides what is made (where files lie does not), so that
    ids of two outputs are the same only where the rows are.

    Raises:
        RecipeError: the name holds what cannot stand in a file's name; or a file that the job reads is not there.
    """
    if given:
        if not re.fullmatch(r"\w[\w.-]*", given):
            raise RecipeError(f"--name {given!r}; expected letters, digits, and _ . - behind the first of them")
        return replace(job, name=given, source=given)  # type: ignore[type-var]
    facts = {key: value for key, value in job.settings.items() if not isinstance(value, Path)}
    digits = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
    return replace(job, name=f"{word}-{digits}")  # type: ignore[type-var]


@dataclass(frozen=True)
class Work:
    """A job and the shards that its plan is cut into."""

    job: Job
    shards: list[Shard]

    def make(self, number: int) -> int:
        """Make a shard unless it is there; returns its number."""
        shard = self.shards[number]
        if not shard.whole.is_dir():
            make_shard(self.job, shard)
        return number


def make(
    job: Job, output: Path, *, engine: str = "local", workers: int = 1, shard_size: int = 32, gpus: float = 0.0
) -> Iterator[Row | Drop]:
    """Do the work that is not done, and give all rows and drops in the order of the plan.

    Args:
        output: the folder of the work. With Ray on several machines it lies, as the source and the recipe itself, on
            a file system that all of them see.
        engine: ``local`` or ``ray``.
        workers: processes. Each holds its own text model.
        shard_size: tasks in a shard.
        gpus: of each worker, with Ray, which hides them from workers that ask for none.

    Raises:
        MakingError: the folder belongs to other work, another process is at it, or Ray is not installed.
    """
    if engine not in ("local", "ray"):
        raise MakingError(f"engine {engine!r}; expected local or ray")
    (output / "shards").mkdir(parents=True, exist_ok=True)
    with _locked(output / JOB / "lock.jsonl"):
        _claim(output, {**job.settings, "shard_size": shard_size})
        _plan(job, output)
        work = Work(job, list(_cut(output, shard_size)))
        _open_again(work.shards)
        yield from _planned_drops(output)
        done = _on_ray(work, workers, gpus) if engine == "ray" else _here(work, workers)
        for number in _told(done, work):
            yield from read_shard(work.shards[number])


def _told(done: Iterator[int], work: Work) -> Iterator[int]:
    """Say now and then how far the work is, and how long the rest may take."""
    total, before = len(work.shards), sum(shard.whole.is_dir() for shard in work.shards)
    if before:
        LOG.info("%d of %d shards are there", before, total)
    began = said = time.monotonic()
    for count, number in enumerate(done, start=1):
        now = time.monotonic()
        if count > before and now - said >= SAY_EVERY:
            left = (now - began) / (count - before) * (total - count)
            LOG.info("%d of %d shards, about %.0f min left", count, total, left / 60)
            said = now
        yield number


def _locked(path: Path) -> AppendOnly:
    try:
        return AppendOnly(path)
    except LockedError as error:
        raise MakingError(f"another process is at the work in {path.parents[1]}; let it end, or stop it") from error


def _claim(output: Path, settings: dict[str, Any]) -> None:
    path = output / JOB / "run.json"
    settings = json.loads(json.dumps(settings, default=str))
    if path.is_file() and path.with_name("tasks.jsonl").is_file():  # without a plan there is no work yet
        known = _settings_in(path)
        other = sorted(k for k in {*known, *settings} if known.get(k) != settings.get(k))
        if other:
            told = [key for key in other if key != "name"] or other  # a name that nobody gave follows from the others
            raise MakingError(
                f"{output} holds work of other settings: {', '.join(told)} differ ({JOB}/{path.name} has them). "
                "Choose another folder, or delete this one to begin again"
            )
        return
    write_whole(path, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def _settings_in(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MakingError(
            f"{path} cannot be read ({error}); delete the folder {path.parents[1]} to begin again"
        ) from error
    if not isinstance(known, dict):
        raise MakingError(f"{path} holds a {type(known).__name__}; delete the folder {path.parents[1]} to begin again")
    return known


def _open_again(shards: list[Shard]) -> None:
    """Take the names of shards that lack files which are there by now, so that they are made anew."""
    for shard in shards:
        lacks = shard.whole / LACKS
        if lacks.is_file() and None in map(lacking, json.loads(lacks.read_text(encoding="utf-8"))):
            shutil.rmtree(shard.folder, ignore_errors=True)
            shard.whole.replace(shard.folder)


def _plan(job: Job, output: Path) -> None:
    """Write the plan, once: what it is made of may be costly, and must not change between two starts."""
    path = output / JOB / "tasks.jsonl"
    if path.is_file():
        return
    partials = {name: path.with_name(f"{name}.partial") for name in ("tasks.jsonl", "drops.jsonl")}
    with (
        partials["tasks.jsonl"].open("w", encoding="utf-8") as tasks,
        partials["drops.jsonl"].open("w", encoding="utf-8") as drops,
    ):
        for item in job.plan():
            file, value = (drops, asdict(item)) if isinstance(item, Drop) else (tasks, item)
            file.write(json.dumps(value, ensure_ascii=False) + "\n")
    for name in ("drops.jsonl", "tasks.jsonl"):  # the tasks last: with them the plan is whole
        partials[name].replace(path.with_name(name))


def _planned_drops(output: Path) -> Iterator[Drop]:
    with (output / JOB / "drops.jsonl").open(encoding="utf-8") as file:
        for line in file:
            yield Drop(**json.loads(line))


def _cut(output: Path, size: int) -> Iterator[Shard]:
    with (output / JOB / "tasks.jsonl").open("rb") as file:
        number, start = 0, 0
        while lines := list(islice(file, size)):
            yield Shard(number, start, len(lines), output.resolve())
            number, start = number + 1, start + sum(map(len, lines))


def read_tasks(shard: Shard) -> list[dict[str, Any]]:
    """The tasks of a shard."""
    with (shard.output / JOB / "tasks.jsonl").open("rb") as file:
        file.seek(shard.start)
        return [json.loads(line) for line in islice(file, shard.count)]


def make_shard(job: Job, shard: Shard) -> None:
    """Make a shard whole or not at all."""
    if shard.folder.exists():
        shutil.rmtree(shard.folder)  # of a run that was killed
    shard.folder.mkdir(parents=True)
    lacks = []
    with (shard.folder / "items.jsonl").open("w", encoding="utf-8") as file:
        for item in job.make(read_tasks(shard), shard):
            kind = "row" if isinstance(item, Row) else "drop"
            file.write(json.dumps({kind: asdict(item)}, ensure_ascii=False) + "\n")
            if isinstance(item, Drop) and item.reason in (MISSING, EMPTY):
                lacks.append(item.detail)
        file.flush()
        os.fsync(file.fileno())
    if lacks:
        (shard.folder / LACKS).write_text(json.dumps(lacks), encoding="utf-8")
    shard.folder.replace(shard.whole)


def read_shard(shard: Shard) -> Iterator[Row | Drop]:
    """The rows and drops of a whole shard; media paths are absolute."""
    with (shard.whole / "items.jsonl").open(encoding="utf-8") as file:
        for line in file:
            item = json.loads(line)
            if "drop" in item:
                yield Drop(**item["drop"])
                continue
            for message in item["row"]["sample"]["messages"]:
                for part in message["content"]:
                    if isinstance(part, dict) and part.get("type") in MEDIA:
                        part[part["type"]] = str(shard.whole / part[part["type"]])  # an absolute path stays
            yield Row(**item["row"])


def _here(work: Work, workers: int) -> Iterator[int]:
    """Make the shards with processes of this machine; their numbers in order."""
    numbers = range(len(work.shards))
    if workers <= 1:
        yield from map(work.make, numbers)
        return
    # Spawned: a forked process inherits locks and threads of the decoders in an unknown state.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_take, initargs=(work,)) as pool:
        futures: list[Future[int]] = [pool.submit(_make_taken, number) for number in numbers]
        try:
            for future in futures:
                yield future.result()
        except BrokenProcessPool as error:
            raise MakingError(
                "a worker process died: out of memory, or by a bug of a decoder. What is made is kept; start again, "
                "with fewer --workers where memory was short. If it dies again, `avllm data check` names the file"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_taken: list[Work] = []


def _take(work: Work) -> None:
    _taken[:] = [work]


def _make_taken(number: int) -> int:
    return _taken[0].make(number)


def _described(job: Job) -> tuple[str, str, dict[str, Any]]:
    """A job's file, class and fields. A recipe is a file that is run; pickle knows the class by no name elsewhere."""
    return inspect.getfile(type(job)), type(job).__name__, {f.name: getattr(job, f.name) for f in fields(job)}  # type: ignore[arg-type]


def _made_anew(file: str, name: str, values: dict[str, Any]) -> Job:
    spec = importlib.util.spec_from_file_location(f"avllm_job_{Path(file).stem}", file)
    assert spec is not None and spec.loader is not None  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return getattr(module, name)(**values)


class _MadeOnRay:
    """The work of one Ray actor: the job comes once, numbers of shards come and go."""

    def __init__(self, described: tuple[str, str, dict[str, Any]], shards: list[Shard]) -> None:
        self.work = Work(_made_anew(*described), shards)

    def __call__(self, number: int) -> int:
        try:
            return self.work.make(number)
        except RecipeError as error:
            raise MakingError(str(error)) from error


def _on_ray(work: Work, workers: int, gpus: float) -> Iterator[int]:
    """Make the shards with Ray; their numbers in order."""
    given = (_described(work.job), work.shards)
    numbers = range(len(work.shards))
    yield from run_on_ray(_MadeOnRay, given, numbers, workers=workers, gpus=gpus, refusal=MakingError)
