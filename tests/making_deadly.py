"""Provide a job that kills the process that does it; workers import it from here."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from avllm.recipes.frame import Drop, RecipeRow
from avllm.recipes.making import Shard


@dataclass(frozen=True)
class Deadly:
    """Two tasks over which a worker dies as by a bug in a decoder."""

    @property
    def settings(self) -> dict[str, Any]:
        """Nothing to choose."""
        return {"job": "deadly"}

    def plan(self) -> Iterator[dict[str, Any] | Drop]:
        """Two tasks."""
        yield from ({"number": number} for number in range(2))

    def make(self, tasks: Sequence[dict[str, Any]], shard: Shard) -> Iterator[RecipeRow | Drop]:
        """Die."""
        os.kill(os.getpid(), signal.SIGKILL)
        yield Drop("never", shard.name)
