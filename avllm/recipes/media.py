"""Find the media of recipes by their ids, in whatever folders and formats a copy has them."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

MISSING = "missing_media"
"""Reason to drop a row: a media file is not there."""
EMPTY = "empty_media"
"""Reason to drop a row: a media file has zero bytes, as failed downloads leave them."""
VIDEO_FILES = (".mp4", ".mkv", ".webm", ".avi", ".mov")
SOUND_FILES = (".wav", ".mp3", ".flac", ".ogg", ".m4a")

VideoFolder = Annotated[
    str, typer.Option(help="The videos are somewhere below this folder, in SOURCE or anywhere.")
]
"""The option of all recipes whose videos are named by their ids."""


class Videos:
    """The videos below a folder, by their names without suffix (ids), however copies nest them."""

    def __init__(self, source: Path, folder: str) -> None:
        self.folder = folder
        self.path_by_stem = files_by_stem(source / folder, source, VIDEO_FILES)

    def part(self, *stems: str, kind: str = "video") -> dict[str, Any]:
        """Return the content part of the first of these names that has a file.

        Where none has, the part names the first, and the frame reports it as missing.

        Args:
            stems: names without suffix.
            kind: ``audio`` takes the video's sound alone.
        """
        for stem in stems:
            if stem in self.path_by_stem:
                return {"type": kind, kind: self.path_by_stem[stem]}
        return {"type": kind, kind: (Path(self.folder) / f"{stems[0]}.mp4").as_posix()}


def vggsound_names(clip: str) -> list[str]:
    """Return the names that copies of VGGSound have for a clip.

    ``<YouTube id>_000030`` is ``<YouTube id>_30`` in copies without leading zeros.
    """
    video, _, start = clip.rpartition("_")
    if not video or not start.isdecimal():
        return [clip]
    return [clip, f"{video}_{int(start)}"]


def files_by_stem(folder: Path, source: Path, suffixes: Iterable[str]) -> dict[str, str]:
    """Return the paths of all files below a folder, relative to ``source``, by name without suffix.

    For media whose folders differ from copy to copy, and whose names are ids. Of two files with one
    name, the first in the order of folders and names counts.
    """
    allowed = tuple(suffixes)
    path_by_stem: dict[str, str] = {}
    for root, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in allowed:
                path = os.path.relpath(os.path.join(root, name), source)
                path_by_stem.setdefault(stem, Path(path).as_posix())
    return path_by_stem


@functools.lru_cache(maxsize=1 << 16)
def lacking(path: str) -> str | None:
    """Return ``MISSING``, ``EMPTY``, or None for a media file with content; answers are cached."""
    if not os.path.isfile(path):
        return MISSING
    return None if os.path.getsize(path) else EMPTY


def first_file(source: Path, names: Iterable[str]) -> str:
    """Return the first of these paths that exists, else the first of all.

    For files that copies of a set name differently.

    Args:
        source: the paths are relative to it.
        names: at least one path.
    """
    names = list(names)
    for name in names:
        if lacking(str(source / name)) != MISSING:
            return name
    return names[0]
