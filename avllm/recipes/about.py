"""What there is to know of a data set before one gets it, and whether a folder holds it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from avllm.recipes.readers import RecipeError


@dataclass(frozen=True)
class Dataset:
    """What there is to know of a data set before one gets it.

    Attributes:
        title: its name.
        licence: of the annotations and of the media; goes into each row that names none.
        size: rows, hours, gigabytes.
        where: address, and what to get there.
        layout: the folder that is expected, one path a line, relative to it, two spaces and words about it. A line
            in brackets is optional; ``a.csv | b.csv`` is either; ``*`` stands for anything.
        citation: the paper.
        command: how to run the recipe where it differs from ``python data_recipes/NAME.py SOURCE --output DIR``.
    """

    title: str
    licence: str
    size: str
    where: str
    layout: str
    citation: str
    command: str = ""


def layout_paths(layout: str) -> Iterator[tuple[list[str], bool]]:
    """(alternatives, required) of each line of a layout."""
    for line in filter(None, map(str.strip, layout.splitlines())):
        path = line.strip("[]").strip().split("  ")[0] if line.startswith("[") else line.split("  ")[0]
        yield [p.strip().rstrip("/") for p in path.split(" | ")], not line.startswith("[")


def check_layout(about: Dataset, source: Path) -> None:
    """Hold a source folder against the layout.

    Raises:
        RecipeError: what has to be there is not.
    """
    if not source.is_dir():
        raise RecipeError(f"{source} is not a folder; expected {about.title}'s. Get it: {about.where}")
    absent = [
        " or ".join(paths)
        for paths, required in layout_paths(about.layout)
        if required and not any(next(source.glob(path), None) for path in paths)
    ]
    if absent:
        layout = "\n  ".join(line.strip() for line in about.layout.strip().splitlines())
        raise RecipeError(
            f"{source} lacks {', '.join(absent)}. Expected of {about.title}:\n  {layout}\nGet it: {about.where}"
        )
