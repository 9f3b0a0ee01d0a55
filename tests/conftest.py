"""What holds for every test."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def _no_realtime() -> Iterator[None]:
    """No test leaves a realtime process: what it starts would starve the rest of the machine."""
    before = os.sched_getscheduler(0) if hasattr(os, "sched_getscheduler") else None
    yield
    if before is not None:
        assert os.sched_getscheduler(0) == before, (
            "this module changed how the process is scheduled"
        )


@pytest.fixture(autouse=True)
def _same_logging() -> Iterator[None]:
    """Restore the package's logger: a test that calls a command's `main` sets its level."""
    logger = logging.getLogger("avllm")
    level, handlers, propagate = logger.level, list(logger.handlers), logger.propagate
    yield
    logger.setLevel(level)
    logger.handlers = handlers
    logger.propagate = propagate
