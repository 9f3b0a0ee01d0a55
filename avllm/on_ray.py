"""Run tasks on Ray Data: actors are set up once, and results come in the order of the tasks."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal

import typer

Engine = Annotated[
    Literal["local", "ray"],
    typer.Option(help="Where shards are made: on this machine, or on Ray (avllm's extra `ray`)."),
]
Gpus = Annotated[float, typer.Option(min=0.0, help="With Ray: GPUs that each worker is given.")]


def import_ray(refusal: type[ValueError]) -> Any:
    """Return the module ``ray``, with Ray Data imported.

    Raises:
        ``refusal``: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        expected = "expected: pip install 'avllm[ray]', or --engine local"
        raise refusal(f"--engine ray needs Ray; {expected}") from error
    return ray


def run_on_ray(
    worker: Callable[..., Callable[[Any], Any]],
    given: Sequence[Any],
    tasks: Sequence[Any],
    *,
    workers: int,
    gpus: float,
    refusal: type[ValueError],
) -> Iterator[Any]:
    """Run tasks on the cluster of RAY_ADDRESS, or with processes of this machine if it is unset.

    Args:
        worker: called once in each actor; returns the function that does one task.
        given: the worker's arguments, sent once.
        tasks: picklable, like the results.
        workers: the number of actors.
        gpus: of each actor; Ray hides all GPUs from actors that ask for none.
        refusal: the class of errors that are meant for the user.

    Returns:
        the results, in the order of the tasks.

    Raises:
        ``refusal``: a task raised it, or Ray is not installed.
    """
    if not tasks:
        return
    ray = import_ray(refusal)
    _start(ray, workers)
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    rows = [{"task": pickle.dumps(task)} for task in tasks]
    data = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _Actor,
        fn_constructor_args=(worker, ray.put(tuple(given)), refusal),
        batch_size=1,
        num_gpus=gpus or None,
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(rows))),
    )
    for row in data.iter_rows():
        if row["error"]:
            raise refusal(row["error"])
        yield pickle.loads(row["result"])


class _Actor:
    """A worker in a separate process, in the form that Ray Data calls."""

    def __init__(
        self,
        worker: Callable[..., Callable[[Any], Any]],
        given: Any,
        refusal: type[ValueError],
    ) -> None:
        import ray

        self.work = worker(*ray.get(given))
        self.refusal = refusal

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        (task,) = batch["task"]
        try:
            return {"result": [pickle.dumps(self.work(pickle.loads(task)))], "error": [""]}
        except self.refusal as error:  # returned as data: Ray would lose the class of an exception
            return {"result": [b""], "error": [str(error)]}


def _start(ray: Any, workers: int) -> None:
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if ray.is_initialized():
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.ERROR, log_to_driver=False)
    else:
        ray.init(
            num_cpus=workers,
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
