"""Decide how a run begins: at its first step, at its newest whole resume point, or not at all."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avllm import distributed
from avllm.config import RunConfig, dump_config
from avllm.data.store.append_only import write_whole
from avllm.errors import writing
from avllm.log import logger
from avllm.training.points.record import (
    RECORD,
    Change,
    ResumeError,
    compare,
    read_record,
    record_of,
    with_date,
)
from avllm.training.points.whole import ResumePoint, newest_whole

LOG = logger(__name__)
FINISHED = "finished.json"


@dataclass(frozen=True)
class RunStart:
    """Say how a run begins.

    Attributes:
        config: the run, with the day on which it began.
        is_finished: there is nothing left to train.
        record: of the run.
        point: where it goes on; None at its beginning.
        longer: its length, if it has become larger than when the point was written.
    """

    config: RunConfig
    is_finished: bool
    record: dict[str, Any]
    point: ResumePoint | None
    longer: Change | None


def begin(config: RunConfig, run: Path, precision: str) -> RunStart:
    """Compare a run with what its folder holds, and record it; every process has to call this.

    A folder without a resume point holds nothing to go on with: after a start that failed, the
    settings may be others. A finished run goes on if its length has grown.

    Args:
        config: the run.
        run: its folder.
        precision: that is computed in.

    Raises:
        ResumeError: the folder holds a run with other settings or files, or no resume point is
            whole.
        WriteError: the folder cannot be written to.
    """
    was_finished = distributed.from_main((run / FINISHED).is_file)
    point: ResumePoint | None = None
    before: dict[str, Any] | None
    if was_finished:
        before = distributed.from_main(lambda: read_record(run))
    else:
        point = newest_whole(run)
        before = point.record if point else None
    config = with_date(config, before)
    record, longer = distributed.from_main(lambda: _compared(config, run, precision, before))
    if was_finished and longer is None:
        LOG.info(
            "%s is finished: nothing to do. To train it for longer, raise train.max_steps (or "
            "train.epochs); to train it again, delete the folder",
            run,
        )
        return RunStart(config, True, record, None, None)
    if was_finished:
        point = newest_whole(run)
        if point is None:
            raise ResumeError(
                f"{run} is finished, and {longer}; but it has no resume point left to go on from. "
                "Start a stage with init instead, or delete the folder to train from the beginning",
                reason="damaged",
            )
    if distributed.is_main():
        _write_record(config, run, record)
    distributed.barrier()
    return RunStart(config, False, record, point, longer)


def _compared(
    config: RunConfig, run: Path, precision: str, before: dict[str, Any] | None
) -> tuple[dict[str, Any], Change | None]:
    record = record_of(config, precision, before)
    if before is None:
        return record, None
    return record, compare(run, before, record, config.data.accept_changes)


def _write_record(config: RunConfig, run: Path, record: dict[str, Any]) -> None:
    with writing(run / RECORD):
        (run / FINISHED).unlink(missing_ok=True)
        write_whole(run / RECORD, json.dumps(record, indent=1))
        dump_config(config, run / "config.yaml")
