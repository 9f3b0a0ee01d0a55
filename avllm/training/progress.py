"""Report a run: a bar, ``metrics.jsonl``, trackers, a loss curve; stop it when a signal asks."""

from __future__ import annotations

import json
import math
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from avllm import distributed
from avllm.errors import WriteError, stop, writing
from avllm.log import logger

LOG = logger(__name__)
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Clock:
    """Measure seconds of training, and those spent waiting for data, since :meth:`read`."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Start at zero."""
        self.began = time.perf_counter()
        self.waited = 0.0
        self.tokens = 0.0

    def waiting(self, seconds: float) -> None:
        """Add seconds that training waited for the loader."""
        self.waited += seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the block's time out: validation and saving are not training."""
        began = time.perf_counter()
        yield
        self.began += time.perf_counter() - began

    def read(self) -> dict[str, float]:
        """Return tokens a second, the share of time spent waiting for data, and seconds; restart.

        Every process has to call it: the share is that of the process that waited longest, since
        the others wait for it.
        """
        seconds = max(time.perf_counter() - self.began, 1e-9)
        waited = max(distributed.gather_objects(self.waited / seconds))
        figures = {"tokens_per_s": self.tokens / seconds, "data_wait": waited, "seconds": seconds}
        self.start()
        return figures


class Report:
    """Append a run's figures to ``metrics.jsonl``, send them to trackers, and show them.

    Args:
        run: the run's folder.
        accelerator: its trackers get the figures.
        steps: of the whole run.
        start: steps done before; figures of later steps are dropped from the file.
    """

    def __init__(self, run: Path, accelerator: Any, steps: int, start: int) -> None:
        self.path = run / "metrics.jsonl"
        self.accelerator = accelerator
        self.steps = steps
        self.bar: Progress | None = None
        if distributed.is_main() and sys.stderr.isatty():
            self.bar = progress_bar(Console(stderr=True))
        if distributed.is_main():
            keep_until(self.path, start)
        if self.bar is not None:
            self.bar.start()
            self.job = self.bar.add_task("train", total=steps, completed=start, figures="")

    def advance(self, step: int) -> None:
        """Move the bar to ``step`` optimizer steps."""
        if self.bar is not None:
            self.bar.update(self.job, completed=step)

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Record figures of a step (main process only)."""
        if not distributed.is_main():
            return
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **figures}) + "\n")
        self.accelerator.log(tracked(figures), step=step)
        text = "  ".join(_show(key, value) for key, value in figures.items() if _is_shown(key))
        if self.bar is not None:
            self.bar.update(self.job, figures=text)
        else:
            LOG.info("step %d/%d  %s", step, self.steps, text)

    def stop(self) -> None:
        """Stop the bar, which would otherwise keep the terminal's cursor."""
        if self.bar is not None:
            self.bar.stop()

    def close(self) -> None:
        """Stop the bar and draw the loss curve."""
        self.stop()
        if distributed.is_main():
            try:
                plot_loss(self.path, self.path.with_name("loss.png"))
            except WriteError as error:  # a picture ends no run
                LOG.warning("%s", error)


_SHOWN = {
    "loss": "loss {:.4f}",
    "validation/loss": "validation {:.4f}",
    "lr": "lr {:.2e}",
    "tokens_per_s": "{:,.0f} tokens/s",
    "data_wait": "data-wait {:.0%}",
    "padding": "padding {:.1%}",
}


FIGURES_OF_A_RUN = {"loss", "lr", "grad_norm", "left_out", *_SHOWN, "seconds"}
"""Figures that belong to no objective."""


def _is_shown(key: str) -> bool:
    """Return whether a figure is printed: a loss, a speed, or an objective's figure in training."""
    return key in _SHOWN or ("/" in key and not key.startswith("validation/"))


def _show(key: str, value: float) -> str:
    if key in _SHOWN:
        return _SHOWN[key].format(value)
    return f"{key} {value:.3f}"


def tracked(figures: Mapping[str, float]) -> dict[str, float]:
    """Return figures by the names that trackers get.

    An objective's loss is ``contrastive/loss`` there, beside its figures ``contrastive/hits``:
    MLflow's file store writes a file for each name, and ``contrastive`` cannot be a folder too.
    """
    names = {}
    for name, value in figures.items():
        folder = name.removeprefix("validation/")
        is_loss = "/" not in folder and folder not in FIGURES_OF_A_RUN
        names[f"{name}/loss" if is_loss else name] = value
    return names


def progress_bar(console: Console) -> Progress:
    """Return the bar of a run: steps, bar, figures, time left.

    In a narrow terminal the figures are cut off, then the bar gets shorter; the rest stays.
    """
    return Progress(
        TextColumn("{task.completed}/{task.total}", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=12, table_column=Column(no_wrap=True)),
        _Figures(table_column=Column(no_wrap=False)),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        console=console,
    )


class _Figures(ProgressColumn):
    """Show a run's figures on one line, cut off where there is no room."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["figures"], no_wrap=True, overflow="ellipsis")


def keep_until(path: Path, step: int) -> None:
    """Drop the lines of steps after ``step``, and a torn last line, from a JSONL file.

    The steps will be done again and write their lines again.
    """
    if not path.is_file():
        return
    # Bytes: a kill may have torn a character, and a text may hold U+2028, which ends no line.
    lines = [line for line in path.read_bytes().split(b"\n") if _step_of(line) <= step]
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        partial.write_bytes(b"".join(line + b"\n" for line in lines))
        partial.replace(path)


def _step_of(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, LookupError, TypeError):  # no JSON, or another value
        return math.inf


class StopRequest:
    """Remember SIGINT (Ctrl-C) and SIGTERM (a scheduler's notice) while its block runs.

    The trainer asks after each step, so that a resume point can be written. A second signal raises
    :class:`~avllm.errors.Stopped` at once. Outside the main thread, signals are left alone.
    """

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            stop(number, frame)
        self.number = number

    def was_made(self, device: torch.device) -> bool:
        """Return True on every process when one of them got a signal; all have to call this."""
        if distributed.world_size() == 1:
            return bool(self.number)
        numbers = torch.tensor(float(self.number), device=device)
        total = distributed.sum_over_processes(numbers)
        self.number = self.number or int(total > 0) * signal.SIGTERM
        return bool(self.number)


def warn_of_stop(step: int, point: Path | None) -> None:
    """Log at which step a run was stopped and from which resume point it will go on."""
    start = "the beginning: train.save_every is larger"
    if point is not None:
        start = point.name.replace("_", " ")
    LOG.warning("stopped at step %d; the same command goes on from %s", step, start)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the rows of a ``metrics.jsonl``."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def plot_loss(metrics: Path, picture: Path) -> None:
    """Draw training and validation loss over steps as PNG, if any figure was recorded."""
    if not metrics.is_file():
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_metrics(metrics)
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="optimizer step", ylabel="loss")
    for key, label in (("loss", "training"), ("validation/loss", "validation")):
        points = [(row["step"], row[key]) for row in rows if key in row]
        if points:
            smoothed = key == "loss" and len(points) > 50
            alpha = 0.5 if smoothed else 1.0
            dot = "o" if len(points) == 1 else None  # a line of one point cannot be seen
            axes.plot(*zip(*points, strict=True), label=label, alpha=alpha, marker=dot)
            if smoothed:
                steps = [step for step, _ in points]
                losses = smooth(loss for _, loss in points)
                axes.plot(steps, losses, label="training, smoothed")
    axes.legend()
    axes.grid(alpha=0.3)
    with writing(picture):
        figure.savefig(picture, dpi=120)


def smooth(values: Iterable[float], decay: float = 0.95) -> list[float]:
    """Return the exponential moving average, corrected for its start."""
    averages: list[float] = []
    mean = 0.0
    weight = 0.0
    for value in values:
        mean = decay * mean + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        averages.append(mean / weight)
    return averages
