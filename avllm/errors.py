"""Report a user's mistakes in one line; everything else is a bug and keeps its traceback."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

DEBUG = "AVLLM_DEBUG"
"""Environment variable that shows the traceback of these errors too."""


class UserError(ValueError):
    """A mistake that the user can fix: the message names seen, expected and what to do.

    A subclass exists where a caller handles one kind of mistake by itself.

    Attributes:
        reason: one word for the kind of error, compared by programs and tests; "" if there is only
            one kind.
        setting: the dotted key of the setting that is wrong; "" where it is not known.
    """

    setting = ""

    def __init__(self, *args: object, reason: str = "") -> None:
        super().__init__(*args)
        self.reason = reason


class OutageError(Exception):
    """A store or server does not answer now: no mistake of the user, and no fault of a row.

    It is no ValueError and no OSError, so that nothing that sets rows aside takes it for a bad row.
    """


class WriteError(UserError):
    """A file cannot be written: the disk is full, read-only, or a limit is reached."""


class Stopped(KeyboardInterrupt):
    """A signal other than Ctrl-C ended the command.

    Attributes:
        number: of the signal; the command exits with 128 + number, the convention of shells.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def stop(number: int, frame: FrameType | None) -> None:
    """Raise :class:`Stopped`, as a handler of signals."""
    raise Stopped(number)


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """End a command with one line on stderr and exit code 1 if its block raises a `UserError`.

    The same holds for errors of the machine (no such file, no permission, a full disk), with
    Python's own text. Ctrl-C ends the command silently, with exit code 130, and SIGTERM, a
    scheduler's notice, with 143: files are closed and processes ended in the same way.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt as error:
        number = error.number if isinstance(error, Stopped) else signal.SIGINT
        raise SystemExit(128 + number) from error
    except (UserError, OutageError, OSError) as error:
        if os.environ.get(DEBUG):
            raise
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        which = f" in process {os.environ.get('RANK')} of {processes}" if processes > 1 else ""
        print(f"error{which}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from error


@contextmanager
def about_setting(key: str) -> Iterator[None]:
    """Name the setting that errors of a block are about, unless their text names it already.

    Args:
        key: dotted, ``model.connector.0``.

    Raises:
        UserError: the block's, with its ``setting``.
    """
    try:
        yield
    except UserError as error:
        if not error.setting:
            error.setting = key
            if key not in str(error):
                error.args = (f"{key}: {error}",)
        raise


def looked_in(path: str | Path) -> str:
    """Return where a relative path was looked for, as an addition to a message; else ""."""
    if os.path.isabs(path) or "://" in str(path):
        return ""
    return f" (looked in {Path.cwd()})"


@contextmanager
def loading(what: str, name: str, setting: str = "") -> Iterator[None]:
    """Name what is loaded in the errors of a library, whose own messages seldom say it.

    Args:
        what: the thing that is loaded, in the user's words ("the LLM's tokenizer").
        name: a folder, or a name on the hub.
        setting: the setting that names it.

    Raises:
        UserError: it cannot be loaded.
    """
    if os.path.isabs(name) and not Path(name).exists():
        expected = "expected a folder with a model, or a name on the hub"
        missing = UserError(f"{what}: {name} is not here; {expected}", reason="missing")
        missing.setting = setting
        raise missing
    try:
        yield
    except UserError:
        raise
    except ImportError:
        raise
    except Exception as error:  # libraries raise a dozen classes for a damaged file
        absent = "" if Path(name).exists() else f"; no folder of this name{looked_in(name)}"
        message = f"{what} {name!r} cannot be loaded: {one_line(error)}{absent}"
        failed = UserError(message, reason="loading")
        failed.setting = setting
        raise failed from error


_NOT_ABOUT_FILES = (
    UserError,
    OutageError,
    ImportError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
)


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Name a file (or folder) in the errors of writing it, whose own messages seldom do.

    Raises:
        WriteError: it cannot be written.
    """
    try:
        yield
    except _NOT_ABOUT_FILES:
        raise
    except Exception as error:  # safetensors, tokenizers and torch raise classes beside OSError
        message = f"{path} cannot be written ({one_line(error)}; {_free_space(path)})"
        raise WriteError(
            f"{message}. Free some space, or give a folder that can be written to; what was "
            "complete before is unchanged",
            reason="unwritable",
        ) from error


def _free_space(path: str | Path) -> str:
    """Return how much space is left where a file would lie: libraries hide that a disk is full."""
    folder = Path(path).absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return f"{shutil.disk_usage(folder).free / 1e9:.2f} GB are free there"


def one_line(error: BaseException, longest: int = 400) -> str:
    """Return the text of a library's error in one line, with its class where the text is bare."""
    text = " ".join(str(error).split())
    if not text or isinstance(error, LookupError):
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= longest else text[:longest] + " ..."
