"""Run a recipe over the source that a test wrote for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from avllm.data.manifest import read_manifest
from avllm.data.schema import Sample
from avllm.recipes.frame import make


class Made:
    """The manifests of a recipe; a function of its name in ``sources`` writes its layout."""

    def __init__(
        self, recipe: ModuleType, sources: ModuleType, folder: Path, **options: Any
    ) -> None:
        name = recipe.__name__.rpartition(".")[2]
        write: Callable[[Path], None] = getattr(sources, name)
        self.recipe = recipe
        self.source = folder / "source"
        self.output = folder / "out"
        self.source.mkdir(exist_ok=True)
        write(self.source)
        self.report = make(
            recipe.ABOUT, recipe.rows, self.source, self.output, name=name, **options
        )

    def rows(self, split: str = "train") -> list[Sample]:
        """Return the rows of a split."""
        return read_manifest(self.output / f"{split}.jsonl")

    @property
    def dropped(self) -> list[tuple[str, str]]:
        """(reason, where) of each drop."""
        lines = (self.output / "dropped.jsonl").read_text(encoding="utf-8").splitlines()
        return [(drop["reason"], drop["where"]) for drop in map(json.loads, lines)]
