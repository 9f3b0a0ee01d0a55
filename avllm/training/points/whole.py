"""Seal a resume point with checksums of its files, and find the newest one that is whole."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from avllm import distributed
from avllm.data.store.append_only import sync, write_whole
from avllm.data.store.storage import sha256
from avllm.log import logger
from avllm.training.points.position import RunPosition
from avllm.training.points.record import ResumeError

LOG = logger(__name__)
POINTS = "checkpoints"
_NAME = re.compile(r"step_\d+")
SEAL = "point.json"
"""Position and record of the run, checksums of the point's other files, and one of itself."""


@dataclass(frozen=True)
class ResumePoint:
    """A resume point that is whole.

    Attributes:
        folder: of the point.
        position: how far the run had come.
        record: of the run, see :func:`avllm.training.points.record.record_of`.
    """

    folder: Path
    position: RunPosition
    record: dict[str, Any]


def points_of(run: Path) -> list[Path]:
    """Return the folders of a run's resume points, oldest first."""
    folders = (path for path in (run / POINTS).glob("step_*") if path.is_dir())
    return sorted((path for path in folders if _NAME.fullmatch(path.name)), key=step_of)


def latest(run: Path) -> Path | None:
    """Return the folder of a run's newest resume point, whole or not; None without one."""
    points = points_of(run)
    return points[-1] if points else None


def step_of(point: Path) -> int:
    """Return the step of a resume point, which its name says."""
    return int(point.name.removeprefix("step_"))


def seal(folder: Path, position: RunPosition, record: dict[str, Any]) -> None:
    """Write the checksums of a point's files beside them; every process has to call this.

    Args:
        folder: the point's files are in it, those of all processes.
        position: of the run.
        record: of the run.
    """
    names = distributed.from_main(lambda: _files_of(folder))
    files = _checksums(folder, names)
    if distributed.is_main():
        for name in names:
            sync(folder / name)  # not every library does
        content = {
            "position": asdict(position),
            "run": record,
            "run_sha256": digest_of(record),
            "files": files,
        }
        sealed = {"content": content, "sha256": digest_of(content)}
        write_whole(folder / SEAL, json.dumps(sealed))
    distributed.barrier()


def digest_of(content: Any) -> str:
    """Return the SHA-256 of a JSON-able value."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _files_of(folder: Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in paths if path.name != SEAL)


def _checksums(folder: Path, names: Sequence[str]) -> dict[str, str | None]:
    """Return the SHA-256 of files, None for a missing one; each process reads its share."""
    own: dict[str, str | None] = {}
    for name in names[distributed.rank() :: distributed.world_size()]:
        path = folder / name
        own[name] = None
        if path.is_file():
            own[name] = sha256(path)
    merged: dict[str, str | None] = {}
    for part in distributed.gather_objects(own):
        merged |= part
    return dict(sorted(merged.items()))


def newest_whole(run: Path) -> ResumePoint | None:
    """Return the newest resume point whose files are those that were written.

    Damaged ones that are newer get a warning. Every process has to call this.

    Returns:
        None where the run has no resume point.

    Raises:
        ResumeError: the run has resume points, and none of them is whole.
    """
    folders = distributed.from_main(lambda: points_of(run))
    faults: list[str] = []
    for folder in reversed(folders):
        try:
            point = read_point(folder)
        except ResumeError as error:
            faults.append(str(error))
            continue
        if faults and distributed.is_main():
            LOG.warning("%s; going on from %s", "; ".join(faults), folder.name)
        return point
    if faults:
        raise ResumeError(
            f"{run}: no resume point is whole: {'; '.join(faults)}. Copy one back from elsewhere, "
            f"or delete {run / POINTS} to train from the beginning",
            reason="damaged",
        )
    return None


def read_point(folder: Path) -> ResumePoint:
    """Read a resume point and compare its files with their checksums; every process calls this.

    Raises:
        ResumeError: ``damaged``; names the file.
    """
    point, files = distributed.from_main(lambda: _read_seal(folder / SEAL))
    for name, checksum in _checksums(folder, list(files)).items():
        if checksum != files[name]:
            what = "is missing" if checksum is None else "differs from its checksum"
            raise ResumeError(f"{folder / name} {what}", reason="damaged")
    return point


def _read_seal(path: Path) -> tuple[ResumePoint, dict[str, str]]:
    """Return the point that a ``point.json`` describes, and the checksums of its other files.

    Raises:
        ResumeError: it is missing, damaged, or of another version.
    """
    if not path.is_file():
        raise ResumeError(f"{path} is missing", reason="damaged")
    try:
        sealed = json.loads(path.read_text(encoding="utf-8"))
        content = sealed["content"]
        is_intact = sealed["sha256"] == digest_of(content)
        position = RunPosition(**content["position"])
        point = ResumePoint(path.parent, position, dict(content["run"]))
        files = dict(content["files"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ResumeError(f"{path} is damaged ({error})", reason="damaged") from error
    if not is_intact:
        raise ResumeError(f"{path} differs from its checksum", reason="damaged")
    return point, files
