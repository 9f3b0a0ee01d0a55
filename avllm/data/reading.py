"""Read media: decode the parts of one file together, remember clips, prepare them for encoders."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from avllm.data.boundary import one_row
from avllm.data.media.load import Clip, MediaError
from avllm.data.media.part import Stretch
from avllm.data.schema import MediaPart, RowError
from avllm.tokens import EncoderInput

Place = tuple[Path, MediaPart]
"""A manifest's folder and a media part of one of its rows."""
Prepared = dict[str, EncoderInput]
"""A clip by stream, as its encoders take it or with their features."""
Prepare = Callable[[Sequence[MediaPart], Path], list[Prepared]]
"""Decodes media parts of a folder and prepares them: :meth:`MediaReader.inputs`."""


class ClipProcessor(Protocol):
    """Decode and prepare clips, as a reader needs it (AVProcessor does)."""

    def load_clips(self, parts: Sequence[MediaPart], root: Path | None) -> list[Clip]:
        """Decode media parts, each interval of a file once."""
        ...

    def prepare(self, clip: Clip, question: str = "") -> Prepared:
        """Prepare each stream of a clip for its encoder."""
        ...


class MediaReader:
    """Decode media parts and prepare them; picklable where the processor is.

    Args:
        processor: decodes and prepares.
        keep_mb: megabytes of decoded clips that are remembered; others are decoded each time.
    """

    def __init__(self, processor: ClipProcessor, keep_mb: float = 0.0) -> None:
        self.processor = processor
        self.keep_mb = keep_mb
        self._clips: dict[tuple[Path | None, MediaPart], Clip] = {}
        self._mb = 0.0

    def clips(self, parts: Sequence[MediaPart], root: Path | None) -> list[Clip]:
        """Decode media parts, those of one file together, or take them from memory.

        Args:
            parts: of a row or of several. root: the folder that relative paths start from.

        Raises:
            MediaError: a file cannot be decoded. RowError: the model has no encoder for it.
        """
        new = [part for part in dict.fromkeys(parts) if (root, part) not in self._clips]
        decoded = dict(zip(new, self.processor.load_clips(new, root), strict=True)) if new else {}
        for part, clip in decoded.items():
            size = clip.size / 1e6
            if self._mb + size <= self.keep_mb:
                self._clips[root, part] = clip
                self._mb += size
        return [decoded[part] if part in decoded else self._clips[root, part] for part in parts]

    def inputs(
        self, parts: Sequence[MediaPart], root: Path | None, question: str = ""
    ) -> list[Prepared]:
        """Decode media parts and prepare them for the encoders; raises as :meth:`clips` does.

        Args:
            question: of the row, for models that choose frames by it.
        """
        return [self.processor.prepare(clip, question) for clip in self.clips(parts, root)]

    def forget(self, but: Sequence[MediaPart] = ()) -> None:
        """Drop the remembered clips, except those of the given parts."""
        self._clips = {key: clip for key, clip in self._clips.items() if key[1] in but}
        self._mb = sum(clip.size / 1e6 for clip in self._clips.values())


@dataclass(frozen=True)
class Reading:
    """Result of reading a media part: its prepared streams or the error, and the seconds it took.

    Attributes:
        number: the part's place among those that were asked for.
    """

    number: int
    found: Prepared | MediaError | RowError
    seconds: float


class _Parts(Dataset[Reading]):
    """Read media parts by number, for a loader."""

    def __init__(self, places: Sequence[Place], prepare: Prepare) -> None:
        self.places = places
        self.prepare = prepare

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> Reading:
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: list[int]) -> list[Reading]:
        by_stretch: dict[tuple[Path, Stretch], dict[int, MediaPart]] = {}
        for number in numbers:
            root, part = self.places[number]
            by_stretch.setdefault((root, Stretch.of(part, root)), {})[number] = part
        readings: dict[int, Reading] = {}
        for (root, _), parts in by_stretch.items():
            readings |= {reading.number: reading for reading in self._read(parts, root)}
        return [readings[number] for number in numbers]

    def _read(self, parts: dict[int, MediaPart], root: Path) -> list[Reading]:
        results: Sequence[Prepared | MediaError | RowError]
        began = time.perf_counter()
        try:
            with one_row():
                results = self.prepare(list(parts.values()), root)
        except (MediaError, RowError) as error:
            if len(parts) > 1:
                # One part may ask for a stream that the others do not need: read them one by one.
                readings = []
                for number, part in parts.items():
                    readings += self._read({number: part}, root)
                return readings
            results = [error]
        seconds = (time.perf_counter() - began) / len(parts)
        return [
            Reading(number, result, seconds) for number, result in zip(parts, results, strict=True)
        ]


def read_batches(
    places: Sequence[Place], prepare: Prepare, batch_size: int, num_workers: int = 0
) -> DataLoader[list[Reading]]:
    """Read media in order, ``batch_size`` at a time, in ``num_workers`` processes.

    0 is this process. Parts of a batch that show the same stretch of a file share one decode.
    """
    return DataLoader(
        _Parts(places, prepare),  # type: ignore[arg-type]
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=list,
        generator=torch.Generator(),  # the global one is left alone
    )
