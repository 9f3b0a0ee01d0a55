"""Check where results will be written, before anything is computed for them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from avllm.data.store.storage import local_path
from avllm.errors import UserError


class OutputPathError(UserError):
    """A path that cannot be written to.

    Reasons: ``is_folder``, ``is_file``, ``no_folder``, ``read_only``, ``is_input``.
    """


def output_file(path: str | Path, inputs: Iterable[str | Path | None] = ()) -> Path:
    """Return the path of a file that will be written; its folder is made.

    Args:
        path: of the file.
        inputs: files that it must not replace; None is passed over.

    Raises:
        OutputPathError: it is a folder, one of the inputs, or cannot be written.
        StoreError: it is a URL.
    """
    path = local_path(path)
    if path.is_dir():
        raise OutputPathError(f"{path} is a folder; expected a file to write", reason="is_folder")
    for given in inputs:
        if given is not None and path.resolve() == Path(given).resolve():
            raise OutputPathError(
                f"{path} is read or written by this command already; choose another output",
                reason="is_input",
            )
    output_folder(path.parent)
    if path.exists() and not os.access(path, os.W_OK):
        raise OutputPathError(
            f"{path} cannot be written: it is read-only; choose another output", reason="read_only"
        )
    return path


def output_folder(path: str | Path) -> Path:
    """Make a folder that files will be written to, and return its path.

    Raises:
        OutputPathError: it is a file, or cannot be made or written to. StoreError: it is a URL.
    """
    path = local_path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise OutputPathError(
            f"{path} is no folder and cannot be made one: a file is in its way; choose another "
            "output",
            reason="is_file",
        ) from error
    except OSError as error:
        raise OutputPathError(
            f"{path} cannot be made ({error.strerror}); choose another output", reason="no_folder"
        ) from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise OutputPathError(
            f"nothing can be written into {path}; choose another output", reason="read_only"
        )
    return path
