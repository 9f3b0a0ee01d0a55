"""Media of recipes by their ids: files are named by them, in whatever folders and formats a copy of a set has them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from avllm.recipes.readers import files_by_stem

VIDEO_FILES = (".mp4", ".mkv", ".webm", ".avi", ".mov")
SOUND_FILES = (".wav", ".mp3", ".flac", ".ogg", ".m4a")

VideoFolder = Annotated[str, typer.Option(help="The videos are somewhere below this folder, in SOURCE or anywhere.")]
"""The option of all recipes whose videos are named by their ids."""


class Videos:
    """The videos below a folder, found by their names without suffix (ids), however copies of the set nest them."""

    def __init__(self, source: Path, folder: str) -> None:
        self.folder = folder
        self.known = files_by_stem(source / folder, source, VIDEO_FILES)

    def part(self, *stems: str, kind: str = "video") -> dict[str, Any]:
        """The content part of the first of these names that is there; of none, the first (the frame reports it).

        Args:
            kind: ``audio`` takes the video's sound alone.
        """
        found = next((self.known[stem] for stem in stems if stem in self.known), None)
        return {"type": kind, kind: found or (Path(self.folder) / f"{stems[0]}.mp4").as_posix()}


def vggsound_names(clip: str) -> list[str]:
    """``<YouTube id>_000030``, and the same as copies of VGGSound have it whose starts are without leading zeros."""
    video, _, start = clip.rpartition("_")
    return [clip, f"{video}_{int(start)}"] if video and start.isdecimal() else [clip]
