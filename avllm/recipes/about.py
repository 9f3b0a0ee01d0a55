"""Describe a data set before a user gets it, and check whether a folder holds it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from avllm.recipes.readers import RecipeError


@dataclass(frozen=True)
class Dataset:
    """Facts about a data set that a user needs before getting it.

    Attributes:
        title: its name.
        licence: of the annotations and of the media; goes into each row that names none.
        size: rows, hours, gigabytes.
        where: address, and what to get there.
        layout: the folder that is expected, one path a line, relative to it, two spaces and words
            about it. A line in brackets is optional; ``a.csv | b.csv`` is either; ``*`` matches
            anything.
        citation: the paper.
        command: how to run the recipe where it differs from
            ``python data_recipes/NAME.py SOURCE --output DIR``.
    """

    title: str
    licence: str
    size: str
    where: str
    layout: str
    citation: str
    command: str = ""


@dataclass(frozen=True)
class LayoutLine:
    """One line of a layout: patterns of which one has to match, and whether it may be absent."""

    patterns: list[str]
    optional: bool

    def matches(self, source: Path) -> bool:
        """Return whether a path below the source matches one of the patterns."""
        return any(next(source.glob(pattern), None) for pattern in self.patterns)


def layout_lines(layout: str) -> Iterator[LayoutLine]:
    """Yield the lines of a layout that are not blank."""
    for line in layout.splitlines():
        text = line.strip()
        if not text:
            continue
        optional = text.startswith("[")
        if optional:
            text = text.strip("[]").strip()
        paths = text.split("  ")[0].split(" | ")
        yield LayoutLine([path.strip().rstrip("/") for path in paths], optional)


def check_layout(about: Dataset, source: Path) -> None:
    """Compare a source folder with the layout.

    Raises:
        RecipeError: ``no_folder``, or ``absent_files`` where a required line matches nothing.
    """
    if not source.is_dir():
        raise RecipeError(
            f"{source} is not a folder; expected {about.title}'s. Get it: {about.where}",
            reason="no_folder",
        )
    absent = [
        " or ".join(line.patterns)
        for line in layout_lines(about.layout)
        if not line.optional and not line.matches(source)
    ]
    if absent:
        expected = "\n  ".join(line.strip() for line in about.layout.strip().splitlines())
        raise RecipeError(
            f"{source} lacks {', '.join(absent)}. Expected of {about.title}:\n  {expected}\n"
            f"Get it: {about.where}",
            reason="absent_files",
        )
