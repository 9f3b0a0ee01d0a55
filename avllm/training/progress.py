"""What a run says while it goes: a progress bar, ``metrics.jsonl``, trackers, and a loss curve at the end."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from avllm import distributed
from avllm.log import logger

LOG = logger(__name__)


class Clock:
    """Seconds of training and, of them, seconds spent waiting for data, since the last :meth:`read`."""

    def __init__(self) -> None:
        self.began, self.waited, self.tokens = time.perf_counter(), 0.0, 0.0

    def waiting(self, seconds: float) -> None:
        """Add time that the loader was waited for."""
        self.waited += seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Validation and saving are no training: their time is not counted."""
        began = time.perf_counter()
        yield
        self.began += time.perf_counter() - began

    def read(self) -> dict[str, float]:
        """Tokens a second, the share of the time spent waiting for data, and seconds; then starts anew.

        Every process has to call it: the share is that of the process which waited longest, for which the others
        wait in their turn.
        """
        seconds = max(time.perf_counter() - self.began, 1e-9)
        waited = max(distributed.gather_objects(self.waited / seconds))
        figures = {"tokens_per_s": self.tokens / seconds, "data_wait": waited, "seconds": seconds}
        self.__init__()  # type: ignore[misc]
        return figures


class Report:
    """The run's figures: appended to ``metrics.jsonl`` and sent to the trackers, shown in the bar or as lines.

    Args:
        run: the run's folder.
        accelerator: its trackers get the figures.
        steps: of the whole run; start: steps done before (a resumed run drops the figures behind them).
    """

    def __init__(self, run: Path, accelerator: Any, steps: int, start: int) -> None:
        self.path, self.accelerator, self.steps = run / "metrics.jsonl", accelerator, steps
        self.bar = _bar() if distributed.is_main() and sys.stderr.isatty() else None
        if distributed.is_main():
            keep_until(self.path, start)
        if self.bar is not None:
            self.bar.start()
            self.job = self.bar.add_task("train", total=steps, completed=start, figures="")

    def advance(self, step: int) -> None:
        """One more optimizer step is done."""
        if self.bar is not None:
            self.bar.update(self.job, completed=step)

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Record figures of a step (main process only)."""
        if not distributed.is_main():
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **figures}) + "\n")
        self.accelerator.log(figures, step=step)
        text = "  ".join(_show(k, v) for k, v in figures.items() if k in _SHOWN)
        if self.bar is not None:
            self.bar.update(self.job, figures=text)
        else:
            LOG.info("step %d/%d  %s", step, self.steps, text)

    def stop(self) -> None:
        """Stop the bar, which else would keep the terminal's cursor."""
        if self.bar is not None:
            self.bar.stop()

    def close(self) -> None:
        """Stop the bar and draw the loss curve."""
        self.stop()
        if distributed.is_main():
            plot_loss(self.path, self.path.with_name("loss.png"))


_SHOWN = {
    "loss": "loss {:.4f}",
    "validation/loss": "validation {:.4f}",
    "lr": "lr {:.2e}",
    "tokens_per_s": "{:,.0f} tokens/s",
    "data_wait": "data-wait {:.0%}",
    "padding": "padding {:.1%}",
}


def _show(key: str, value: float) -> str:
    return _SHOWN[key].format(value)


def _bar() -> Progress:
    columns = (TextColumn("{task.completed}/{task.total}"), BarColumn(), TextColumn("{task.fields[figures]}"))
    return Progress(*columns, TimeRemainingColumn())


def keep_until(path: Path, step: int) -> None:
    """Drop the lines of steps after ``step`` from a JSONL file: they will be written again, also a torn last line."""
    if not path.is_file():
        return
    # bytes: a kill may have torn a character, and a text may hold U+2028, which ends no line of JSON
    kept = [line for line in path.read_bytes().split(b"\n") if _step_of(line) <= step]
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(b"".join(line + b"\n" for line in kept))
    partial.replace(path)


def _step_of(line: bytes) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, UnicodeDecodeError):
        return math.inf


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a ``metrics.jsonl``."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def plot_loss(metrics: Path, picture: Path) -> None:
    """Draw training and validation loss over steps as PNG; nothing when no figure was recorded."""
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
            alpha = 0.5 if key == "loss" and len(points) > 50 else 1.0
            dot = "o" if len(points) == 1 else None  # a line of one point is not seen
            axes.plot(*zip(*points, strict=True), label=label, alpha=alpha, marker=dot)
        if key == "loss" and len(points) > 50:
            axes.plot([s for s, _ in points], smooth([v for _, v in points]), label="training, smoothed")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=120)


def smooth(values: Iterable[float], decay: float = 0.95) -> list[float]:
    """Exponential moving average, corrected for its start."""
    out, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        out.append(mean / weight)
    return out
