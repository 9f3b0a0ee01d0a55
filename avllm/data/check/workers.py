"""Run tasks that may hang or kill their process: each has a time limit, and costs at most itself.

``concurrent.futures`` and ``multiprocessing.Pool`` give up, or wait for ever, when one worker dies
inside a C library; here each worker has its own pipe, and is killed and replaced alone.
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
# Imported by the server that forks the workers, since that takes seconds.
MEDIA = "avllm.data.media.load"


@dataclass(frozen=True)
class Lost:
    """Report a task whose worker gave no result.

    Attributes:
        reason: ``timeout`` or ``crashed``.
        detail: what was seen.
    """

    reason: str
    detail: str


def run_guarded(
    function: Callable[[T], Any],
    tasks: Iterable[T],
    *,
    workers: int,
    seconds: Callable[[T], float],
) -> Iterator[tuple[T, Any]]:
    """Call a function on tasks in worker processes; yield results as they arrive, in any order.

    Args:
        function: takes one task and returns a picklable value; it is defined in a module, or a
            partial of such a function.
        tasks: read lazily, one ahead of the workers.
        workers: how many processes.
        seconds: the time limit of a task.

    Yields:
        (task, result); the result is :class:`Lost` when the process hung or died during the task.

    Raises:
        RuntimeError: a worker dies before it gets a task.
    """
    remaining = iter(tasks)
    next_task = next(remaining, None)
    pool: list[_Worker[T]] = []
    try:
        if next_task is not None:
            pool += [_Worker(function) for _ in range(max(1, workers))]
        while next_task is not None or any(worker.task is not None for worker in pool):
            for worker in pool:
                if next_task is not None and worker.idle:
                    worker.give(next_task, seconds(next_task))
                    next_task = next(remaining, None)
            yield from _collect(pool, function)
    finally:
        for worker in pool:
            worker.end()


def _collect(pool: list[_Worker[T]], function: Callable[[T], Any]) -> Iterator[tuple[T, Any]]:
    """Yield the results that arrive before the next deadline; replace lost workers."""
    busy = [worker for worker in pool if not worker.idle]
    pause = max(0.0, min(worker.deadline for worker in busy) - time.monotonic())
    wait([worker.pipe for worker in busy], timeout=pause)
    for number, worker in enumerate(pool):
        if worker.idle:
            continue
        answer = worker.answer()
        if isinstance(answer, Lost):
            if not worker.started:
                raise RuntimeError(
                    f"a worker process {answer.detail} before it had a task; see its message above",
                )
            worker.end()
            pool[number] = _Worker(function)
        if answer is not None and worker.task is not None:
            yield worker.take(), answer.value if isinstance(answer, _Value) else answer


@dataclass(frozen=True)
class _Value:
    value: Any


class _Worker(Generic[T]):
    """Hold one process, its pipe, and the task that it works on."""

    def __init__(self, function: Callable[[T], Any]) -> None:
        context = _context(function)
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, function), daemon=True)
        self.process.start()
        theirs.close()  # else the pipe would not end with the process
        self.task: T | None = None
        self.started = False
        self.limit = START_SECONDS
        self.deadline = time.monotonic() + START_SECONDS

    @property
    def idle(self) -> bool:
        return self.started and self.task is None

    def give(self, task: T, seconds: float) -> None:
        self.task = task
        self.limit = seconds
        self.deadline = time.monotonic() + seconds
        try:
            self.pipe.send((task, seconds))
        except BrokenPipeError:  # it died while it was idle: answer() reports that
            return

    def take(self) -> T:
        assert self.task is not None
        task = self.task
        self.task = None
        return task

    def answer(self) -> _Value | Lost | None:
        """Return a result, the loss of the process, or None when no result has arrived."""
        if not self.pipe.poll():
            if time.monotonic() > self.deadline:
                return Lost("timeout", f"gave no answer in {self.limit:g} s and was stopped")
            return None
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
    """Return a context that forks a server with the imports, which takes milliseconds a worker."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # Of a partial: the modules of its function and of its arguments.
    own_module = getattr(function, "func", function).__module__
    argument_modules = [type(value).__module__ for value in getattr(function, "args", ())]
    context.set_forkserver_preload([MEDIA, own_module, *argument_modules])
    return context


def _serve(pipe: Connection, function: Callable[[Any], Any]) -> None:
    """Receive tasks and send results until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends the workers
    os.environ["OMP_NUM_THREADS"] = "1"
    pipe.send(READY)
    while True:
        try:
            task, seconds = pipe.recv()
        except (EOFError, ConnectionResetError):
            return
        # If the main process is gone, the kernel ends a call that hangs.
        signal.alarm(int(seconds) + 5)
        result = function(task)
        signal.alarm(0)
        pipe.send(result)
