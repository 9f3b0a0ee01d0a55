"""Let one run at a time write into an output folder."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import IO

from avllm import distributed
from avllm.errors import UserError, writing
from avllm.log import logger

LOG = logger(__name__)
NAME = "run.lock"
TAKEN = (errno.EACCES, errno.EAGAIN)
_own: set[Path] = set()
"""Folders that this process has locked: the system lets a process lock a file twice."""


class RunInUseError(UserError):
    """Another run is writing into the output folder."""


class RunLock:
    """Hold an output folder for one run, from ``with`` to the end of the process at the latest.

    Every process of the run enters; the main one locks. ``run.lock`` in the folder names it. The
    lock is the system's record lock: it ends with the process, also after SIGKILL, and forked
    loader workers that outlive it do not hold it. A file system without locks costs a warning.

    Args:
        run: the output folder; made if it does not exist.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self.path = run.absolute() / NAME
        self._file: IO[str] | None = None

    def __enter__(self) -> RunLock:
        """Lock the folder.

        Raises:
            RunInUseError: another run has locked it; names its process, machine and start.
            WriteError: the folder cannot be written to.
        """
        distributed.from_main(self._lock)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            _own.discard(self.path)
            self._file.close()  # releases the lock

    def _lock(self) -> None:
        if self.path in _own:
            # Not opened: when a process closes a file, all its locks on the file are released.
            raise self._refusal(f"this process, {os.getpid()}")
        with writing(self.path):
            self.run.mkdir(parents=True, exist_ok=True)
            file = self.path.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in TAKEN:
                file.close()
                raise self._refusal(self.path.read_text(encoding="utf-8").strip()) from error
            LOG.warning(
                "%s cannot be locked (%s): a second run on this folder would not be noticed, and "
                "both would be lost; start none",
                self.path,
                error.strerror,
            )
        began = time.strftime("%Y-%m-%d %H:%M:%S")
        with writing(self.path):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {began}\n")
            file.flush()
        self._file = file
        _own.add(self.path)

    def _refusal(self, holder: str) -> RunInUseError:
        return RunInUseError(
            f"{self.run} is being written by {holder or 'another process'}; expected a folder "
            "without a run in progress. Wait for its end, stop it, or give another `output`",
            reason="in_use",
        )
