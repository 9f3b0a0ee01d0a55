"""What a user can mend is told in a line; everything else is a bug, and stays a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DEBUG = "AVLLM_DEBUG"
"""Environment variable that shows the traceback of these errors too."""


class UserError(ValueError):
    """Something that the user can mend: the message says what was seen, what was expected, and what to do.

    Errors of this kind have a class of their own where somebody tells them apart, and are plain ones elsewhere.

    Attributes:
        reason: one word for the kind of error, which programs and tests compare; "" where there is one kind.
    """

    def __init__(self, *args: object, reason: str = "") -> None:
        super().__init__(*args)
        self.reason = reason


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Around a command: what the user can mend ends it with one line on stderr and exit code 1.

    So do errors of the machine (no such file, no permission, a full disk), which Python's own text names. Ctrl-C ends
    it without a word.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        raise SystemExit(130) from error  # 128 + SIGINT, as shells have it
    except (UserError, OSError) as error:
        if os.environ.get(DEBUG):
            raise
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        which = f" in process {os.environ.get('RANK')} of {processes}" if processes > 1 else ""
        print(f"error{which}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from error


@contextmanager
def loading(what: str, name: str) -> Iterator[None]:
    """Around a library's loading by name, whose complaints seldom say what was asked for.

    Args:
        what: is loaded, as the user knows it. name: a folder, or a name on the hub.

    Raises:
        UserError: it cannot be loaded.
    """
    if os.path.isabs(name) and not Path(name).exists():
        raise UserError(f"{what}: {name} is not here; expected a folder with a model, or a name on the hub")
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{what} {name!r} cannot be loaded: {error}") from error
