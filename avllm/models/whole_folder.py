"""Replace the files of a checkpoint together: a kill leaves all old files or all new ones.

They are written into a hidden folder. A checkpoint that has its folder for itself is exchanged with
it in one step of the system. Into a run's folder, which holds more, the files are moved one by one,
the manifest last: until it is there, the folder is no checkpoint, and the run writes it again.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from avllm.data.store.append_only import sync
from avllm.errors import writing
from avllm.models.checkpoint_format import MANIFEST
from avllm.models.loading.digests import ALL_FILES, PROCESSOR_FILES, files_of, record_processor

PARTIAL = ".partial"
_THIS_FOLDER = -100  # AT_FDCWD of fcntl.h
_EXCHANGE = 2  # RENAME_EXCHANGE of stdio.h


@contextmanager
def replacing(folder: str | Path, patterns: Sequence[str]) -> Iterator[Path]:
    """Yield a hidden folder; its files take the place of those in ``folder`` when the block ends.

    Args:
        folder: the checkpoint; made if it does not exist. Its other files stay.
        patterns: of the files that the block writes; files of the folder that match them go. The
            block sees the folder's other files too, and must not write to them.

    Raises:
        WriteError: a file cannot be written; the folder is unchanged.
    """
    final = Path(folder).resolve()
    if final.name.endswith(PARTIAL):  # a part of a checkpoint that is replaced as a whole
        yield final
        return
    for place in (final.parent, final):
        shutil.rmtree(place / f".{final.name}{PARTIAL}", ignore_errors=True)
    others = _others(final, patterns)
    is_alone = _is_alone(final)
    place = final.parent if is_alone else final
    partial = place / f".{final.name}{PARTIAL}"
    try:
        with writing(final):
            partial.mkdir(parents=True)
            for name in others if is_alone else {MANIFEST} & others:
                _link(final / name, partial / name)
            yield partial
            _sync(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    with writing(final):
        if is_alone:
            _exchange(partial, final)
        else:
            _move(partial, final, patterns)
        shutil.rmtree(partial, ignore_errors=True)


def save_processor(save: Callable[..., list[str]], folder: str | Path, **options: Any) -> list[str]:
    """Write a processor's files, all of them or none; record their digests in a manifest.

    Args:
        save: transformers' ``save_pretrained``.
        folder: of the processor, or of a whole checkpoint.
        options: of ``save``.

    Returns:
        the files.
    """
    with replacing(folder, PROCESSOR_FILES) as partial:
        files = save(str(partial), **options)
        record_processor(partial)
    return [str(Path(folder) / Path(file).relative_to(partial)) for file in files]


def _others(folder: Path, patterns: Sequence[str]) -> set[str]:
    """Return the files of a folder that stay, relative to it."""
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return {path.relative_to(folder).as_posix() for path in paths} - set(files_of(folder, patterns))


def _is_alone(folder: Path) -> bool:
    """Return True where a folder can be exchanged: there are no folders in it but a checkpoint's.

    A mounted folder, the working directory, and one in a folder that cannot be written to cannot.
    """
    if not folder.exists():
        return True
    own_folders = {pattern.partition("/")[0] for pattern in ALL_FILES if "/" in pattern}
    entries = [path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]
    holds_others = any(path.name not in own_folders for path in entries)
    is_fixed = os.path.ismount(folder) or not os.access(folder.parent, os.W_OK)
    is_worked_in = Path.cwd().is_relative_to(folder)
    return not holds_others and not is_fixed and not is_worked_in


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target, follow_symlinks=False)


def _sync(folder: Path) -> None:
    """Return when all files of a folder are on the disk."""
    for path in [folder, *folder.rglob("*")]:
        if not path.is_symlink():
            sync(path)


def _exchange(new: Path, old: Path) -> None:
    """Give a folder the name of another, which gets the first one's name."""
    if not old.exists():
        new.rename(old)
    else:
        shutil.copymode(old, new)
        try:
            _exchange_at_once(new, old)
        except OSError:  # not every system and file system can
            aside = new.with_name(new.name + ".old")
            shutil.rmtree(aside, ignore_errors=True)
            old.rename(aside)
            new.rename(old)
            shutil.rmtree(aside)
    sync(old.parent)


def _exchange_at_once(new: Path, old: Path) -> None:
    system = ctypes.CDLL(None, use_errno=True)
    if not hasattr(system, "renameat2"):
        raise OSError("no renameat2")
    first = os.fsencode(new)
    second = os.fsencode(old)
    if system.renameat2(_THIS_FOLDER, first, _THIS_FOLDER, second, _EXCHANGE) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _move(new: Path, old: Path, patterns: Sequence[str]) -> None:
    """Move files into a folder that holds others too, the manifest last."""
    names = files_of(new, patterns)
    (old / MANIFEST).unlink(missing_ok=True)
    for name in set(files_of(old, patterns)) - set(names):
        (old / name).unlink()
    for name in [*names, *({MANIFEST} & set(os.listdir(new)))]:
        (old / name).parent.mkdir(parents=True, exist_ok=True)
        (new / name).replace(old / name)
        sync((old / name).parent)
