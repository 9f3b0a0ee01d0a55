"""Follow the learning rate over a run's steps, also when the run is continued for longer."""

from __future__ import annotations

from dataclasses import dataclass, replace

from avllm import distributed
from avllm.config import RunConfig
from avllm.data.mixture import Order, steps_of
from avllm.log import logger
from avllm.training.optim import lr_factor
from avllm.training.points.record import Change

LOG = logger(__name__)


@dataclass(frozen=True)
class Schedule:
    """Give the share of the peak learning rate at each step.

    Attributes:
        total: steps of the run.
        warmup: steps of the warm-up.
        kind: ``cosine`` or ``constant``.
        floor: share at the end of ``cosine``.
    """

    total: int
    warmup: int
    kind: str
    floor: float

    @classmethod
    def of(cls, config: RunConfig, steps: int) -> Schedule:
        """Return the schedule of a run that has so many steps from its beginning."""
        train = config.train
        warmup = round(train.warmup * steps if train.warmup < 1 else train.warmup)
        return cls(steps, warmup, train.schedule, train.min_lr_ratio)

    def factor(self, step: int) -> float:
        """Return the share of the peak at an optimizer step (from 0)."""
        return lr_factor(
            step, total=self.total, warmup=self.warmup, schedule=self.kind, floor=self.floor
        )


def say_longer(
    longer: Change, config: RunConfig, order: Order, schedule: Schedule, step: int, peak: float
) -> None:
    """Log what a run's new length does to its learning rate.

    Args:
        longer: the length that has grown. config: the run, with the new one.
        order: of its items. schedule: with the new length.
        step: steps done. peak: highest learning rate.
    """
    shorter = config.model_copy(deep=True)
    setattr(shorter.train, longer.key.removeprefix("train."), longer.old)
    before = replace(schedule, total=steps_of(shorter, order, distributed.world_size()))
    LOG.info(
        "%s: the run and its %s schedule now end at step %d instead of %d; the warm-up (%d steps) "
        "is not repeated; the rate of step %d is %.2e, and was to be %.2e",
        longer,
        schedule.kind,
        schedule.total,
        before.total,
        schedule.warmup,
        step + 1,
        peak * schedule.factor(step),
        peak * before.factor(step),
    )
