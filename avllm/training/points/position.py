"""Record how far a run has come."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class RunPosition:
    """Record how far a run has come.

    Attributes:
        step: optimizer steps done.
        seen: manifest rows looked at.
        skipped: rows left out, by ``source/reason``.
        best: best figure of validation (``train.best_by``), None before the first.
        trained: steps that had a target.
        warmup: steps of the warm-up, as of the run's beginning: it is not repeated, nor longer,
            when the run is continued for more steps.
    """

    step: int = 0
    seen: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    best: float | None = None
    trained: int = 0
    warmup: int = 0
