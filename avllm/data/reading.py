"""Media parts for a loader: decoded, and prepared for the encoders; those that show one stretch of a file together."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from avllm.data.media.load import MediaError
from avllm.data.media.part import Stretch
from avllm.data.schema import MediaPart, RowError
from avllm.tokens import EncoderInput

Place = tuple[Path, MediaPart]
"""A manifest's folder and a media part of one of its rows."""
Prepared = dict[str, EncoderInput]
"""A clip by stream, as its encoders take it or with their features."""
Prepare = Callable[[Sequence[MediaPart], Path], list[Prepared]]
"""Decodes media parts, their paths relative to a folder, and prepares them: ``AVProcessor.read``."""


@dataclass(frozen=True)
class Reading:
    """What became of a media part: its prepared streams, or what is wrong with it; and the seconds that took."""

    number: int
    found: Prepared | MediaError | RowError
    seconds: float


class _Media(Dataset[Reading]):
    """Map-style, and picklable where ``prepare`` is."""

    def __init__(self, places: Sequence[Place], prepare: Prepare) -> None:
        self.places, self.prepare = places, prepare

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> Reading:
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: list[int]) -> list[Reading]:
        together: dict[tuple[Path, Stretch], dict[int, MediaPart]] = {}
        for number in numbers:
            root, part = self.places[number]
            together.setdefault((root, Stretch.of(part, root)), {})[number] = part
        read = {one.number: one for (root, _), parts in together.items() for one in self._read(parts, root)}
        return [read[number] for number in numbers]

    def _read(self, parts: dict[int, MediaPart], root: Path) -> list[Reading]:
        found: Sequence[Prepared | MediaError | RowError]
        began = time.perf_counter()
        try:
            found = self.prepare(list(parts.values()), root)
        except (MediaError, RowError) as error:
            if len(parts) > 1:  # what one of them cannot have, another may not ask for
                return [reading for number, part in parts.items() for reading in self._read({number: part}, root)]
            found = [error]
        seconds = (time.perf_counter() - began) / len(parts)
        return [Reading(number, clip, seconds) for number, clip in zip(parts, found, strict=True)]


def read_batches(
    places: Sequence[Place], prepare: Prepare, batch_size: int, num_workers: int = 0
) -> DataLoader[list[Reading]]:
    """Media parts in order, ``batch_size`` at a time, read by ``num_workers`` processes (0 = by this one).

    Parts of a batch that show the same stretch of a file share one decode.
    """
    return DataLoader(
        _Media(places, prepare),  # type: ignore[arg-type]
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=list,
        generator=torch.Generator(),  # the global one is left alone
    )
