"""Work that may hang, or kill its process: each task has a time-out, and a worker that is lost takes nothing with it.

``concurrent.futures`` and ``multiprocessing.Pool`` give up, or wait for ever, when one worker dies inside a C library;
here each worker has a pipe of its own and is killed and replaced alone.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

T = TypeVar("T")

START_SECONDS = 180.0  # a worker imports torch and libav first; on a busy machine that takes long
READY = "ready"
MEDIA = "avllm.data.media.load"  # takes seconds to import; the server finds it wherever the function's own module lies


@dataclass(frozen=True)
class Lost:
    """What stands in the place of a result that a worker never gave.

    Attributes:
        reason: ``timeout`` or ``crashed``.
        detail: what was seen.
    """

    reason: str
    detail: str


def run_guarded(
    function: Callable[[T], Any], tasks: Iterable[T], *, workers: int, seconds: Callable[[T], float]
) -> Iterator[tuple[T, Any]]:
    """Call a function on tasks in processes of their own; results come as they are ready, in any order.

    Args:
        function: stands in a module (or is a partial of one that does), takes one task, gives something picklable.
        tasks: read lazily, one ahead of the workers.
        workers: how many processes.
        seconds: the time-out of a task.

    Yields:
        (task, result); the result is :class:`Lost` when the process hung or died over the task.

    Raises:
        RuntimeError: workers do not even start.
    """
    todo = iter(tasks)
    spare = next(todo, None)
    pool: list[_Worker[T]] = []
    try:
        if spare is not None:
            pool += [_Worker(function) for _ in range(max(1, workers))]
        while spare is not None or any(worker.task is not None for worker in pool):
            for worker in pool:
                if spare is not None and worker.idle:
                    worker.give(spare, seconds(spare))
                    spare = next(todo, None)
            yield from _collect(pool, function)
    finally:
        for worker in pool:
            worker.end()


def _collect(pool: list[_Worker[T]], function: Callable[[T], Any]) -> Iterator[tuple[T, Any]]:
    """What came in until the next deadline; lost workers are replaced in place."""
    busy = [worker for worker in pool if not worker.idle]
    pause = max(0.0, min(worker.until for worker in busy) - time.monotonic())
    wait([worker.pipe for worker in busy], timeout=pause)
    for place, worker in enumerate(pool):
        if worker.idle:
            continue
        answer = worker.answer()
        if isinstance(answer, Lost):
            if not worker.started:
                raise RuntimeError(f"a worker process {answer.detail} before it had a task; see its message above")
            worker.end()
            pool[place] = _Worker(function)
        if answer is not None and worker.task is not None:
            yield worker.take(), answer.value if isinstance(answer, _Value) else answer


@dataclass(frozen=True)
class _Value:
    value: Any


class _Worker(Generic[T]):
    """One process, its pipe, and the task that it has."""

    def __init__(self, function: Callable[[T], Any]) -> None:
        context = _context(function)
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, function), daemon=True)
        self.process.start()
        theirs.close()  # else the pipe would not end with the process
        self.task: T | None = None
        self.started, self.limit = False, START_SECONDS
        self.until = time.monotonic() + START_SECONDS

    @property
    def idle(self) -> bool:
        return self.started and self.task is None

    def give(self, task: T, seconds: float) -> None:
        self.task, self.limit, self.until = task, seconds, time.monotonic() + seconds
        try:
            self.pipe.send((task, seconds))
        except BrokenPipeError:  # it died while it had nothing to do: answer() tells
            return

    def take(self) -> T:
        task, self.task = self.task, None
        assert task is not None
        return task

    def answer(self) -> _Value | Lost | None:
        """A result, what became of the process, or None when there is nothing yet (or it has just started)."""
        if not self.pipe.poll():
            late = time.monotonic() > self.until
            return Lost("timeout", f"gave no answer in {self.limit:g} s and was stopped") if late else None
        try:
            message = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            return Lost("crashed", _ending(self.process.exitcode))
        if message == READY and not self.started:
            self.started = True
            return None
        return _Value(message)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def _context(function: Callable[..., Any]) -> Any:
    """A server that has imported what the tasks need, and forks: replacing a worker takes milliseconds."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    given = [type(value).__module__ for value in getattr(function, "args", ())]
    context.set_forkserver_preload([MEDIA, getattr(function, "func", function).__module__, *given])
    return context


def _serve(pipe: Connection, function: Callable[[Any], Any]) -> None:
    """A worker's life: tasks in, results out, until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that gave the tasks ends the workers
    os.environ["OMP_NUM_THREADS"] = "1"
    pipe.send(READY)
    while True:
        try:
            task, seconds = pipe.recv()
        except (EOFError, ConnectionResetError):
            return
        # Should the process that watches be gone, the kernel ends a call that hangs.
        signal.alarm(int(seconds) + 5)
        result = function(task)
        signal.alarm(0)
        pipe.send(result)
