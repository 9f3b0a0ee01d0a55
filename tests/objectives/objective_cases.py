"""Options and rows with which each objective is tested.

A new one is tested with its defaults on the tiny world's questions; one that needs more gets a
row here, or several.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiny import World, make_preferences, make_regions

from avllm.data.row_makers.base import RowMaker
from avllm.data.row_makers.preference import Preference
from avllm.registry import choices


@dataclass(frozen=True)
class ObjectiveCase:
    """One setting of an objective.

    Attributes:
        options: beside its type.
        manifest: writes or picks the rows that it needs; it gets the tiny world.
        rows: how many of them make the batch. maker: turns them into rows; None for one row each.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    manifest: Callable[[World], Path] = lambda world: world.questions
    rows: int = 12
    maker: RowMaker | None = None

    @property
    def spec(self) -> dict[str, Any]:
        """The objective's section of a preset."""
        return {"type": self.name, **self.options}

    def __str__(self) -> str:
        options = "-".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.name}-{options}" if options else self.name


def _captions(world: World) -> Path:
    return world.captions


CASES: dict[str, list[ObjectiveCase]] = {
    "assignment": [
        ObjectiveCase("assignment", manifest=_captions, rows=6),
        ObjectiveCase("assignment", {"marginal": "uniform", "words": 20}, _captions, rows=6),
    ],
    "consistency": [
        ObjectiveCase("consistency", {"irrelevant": {"heard": ["video"], "seen": ["audio"]}}),
    ],
    "query_diversity": [ObjectiveCase("query_diversity", {"stream": "video"})],
    "region_guide": [
        ObjectiveCase("region_guide", {"stream": "video", "adapter": 0, "n": 3}, make_regions)
    ],
    "contrastive": [
        ObjectiveCase("contrastive"),
        ObjectiveCase("contrastive", {"pairs": ["video-audio"]}, _captions, rows=6),
        ObjectiveCase(
            "contrastive", {"pairs": ["av-text"], "captions_only": True}, _captions, rows=6
        ),
    ],
    "dpo": [ObjectiveCase("dpo", manifest=make_preferences, maker=Preference())],
}


def cases() -> list[ObjectiveCase]:
    """Return the cases of everything that the registry lists."""
    return [
        case for name in choices("objectives") for case in CASES.get(name, [ObjectiveCase(name)])
    ]
