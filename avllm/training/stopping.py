"""Stop a run at the end of a step when a signal asks for it."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch

from avllm import distributed
from avllm.errors import stop

SIGNALS = (signal.SIGINT, signal.SIGTERM)


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
