"""Keep the fault of one row from ending a run."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from avllm.data.schema import RowError
from avllm.errors import OutageError, UserError, one_line
from avllm.log import logger

LOG = logger(__name__)

OF_THE_MACHINE = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ENOMEM}
)
"""Errors that the next row would meet too: too many open files, a full disk, a broken one."""

_reported: set[str] = set()


@contextmanager
def one_row() -> Iterator[None]:
    """Turn whatever the block raises about a row into a fault of that row.

    Libraries raise dozens of classes for odd input: a codec's own, RecursionError of a regular
    expression, UnicodeError of a file's name, RuntimeError of an allocator. A run of days must not
    end at one of them. The first of each class is logged with its traceback, since it may be a bug;
    rows beyond ``max_skip_rate`` end the run all the same.

    Raises:
        RowError: with the reason ``unexpected``, instead of any exception but the following.
        UserError: unchanged: MediaError and RowError name the fault already, others are about the
            run (a damaged cache, a manifest that was changed).
        OutageError: unchanged: the next row would meet it too.
        OSError: unchanged when it is about the machine, see ``OF_THE_MACHINE``.
    """
    try:
        yield
    except (UserError, OutageError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in OF_THE_MACHINE:
            raise
        name = type(error).__name__
        if name not in _reported:
            _reported.add(name)
            LOG.warning("a row is left out; the first %s:", name, exc_info=error)
        raise RowError("unexpected", f"{name}: {one_line(error)}") from error
