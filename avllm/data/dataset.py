"""Manifests as a map from an item's number to its token rows: decoding and tokenizing, no order and no randomness.

An item is one row of a manifest, or, when packing, the rows that ask about the same media. A row that cannot be used
comes out as a named :class:`Bad`, never as another row in its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from avllm.data.augment import Augment
from avllm.data.cache.fill import FeatureCache
from avllm.data.collate import Row
from avllm.data.items import Bad, Items
from avllm.data.media.load import Clip, MediaError, Sound
from avllm.data.packing import pack_rows
from avllm.data.reading import Place, Prepared
from avllm.data.schema import MediaPart, RowError, Sample
from avllm.tokens import EncoderInput

KEPT_TEXTS = 5_000  # items whose token rows each loader process remembers, about 10 kB each


@dataclass
class Loaded:
    """What one item became: token rows (fewer than ``seen`` where rows were packed), and the rows left out of it."""

    rows: list[Row]
    bad: list[Bad]
    seen: int


class Reader(Protocol):
    """What the dataset wants of a processor (AVProcessor has it)."""

    max_length: int

    def load_clips(self, parts: Sequence[MediaPart], root: Path | None) -> list[Clip]:
        """Decode the media parts of a row, each interval of a file once."""
        ...

    def prepare(self, clip: Clip) -> dict[str, EncoderInput]:
        """Each stream of a clip as its encoder takes it."""
        ...

    def order(self, clip: dict[str, EncoderInput]) -> list[str]:
        """The streams' names in the order of the LLM's sequence, one a token."""
        ...

    def row(self, sample: Sample, clips: Sequence[dict[str, EncoderInput]], *, runs: Sequence[list[str]]) -> Row:
        """Tokenize a sample; ``runs`` is :meth:`order` of each clip."""
        ...


class Places(Sequence[Place]):
    """Media parts of some datasets, as the feature cache addresses them; what rows share comes once.

    They are read from the manifests when asked for: a million of them as objects would take a gigabyte.

    Args:
        datasets: and of each which items are meant, ``(items,)`` bool; None = all.
    """

    def __init__(self, datasets: Sequence[tuple[SampleDataset, np.ndarray | None]]) -> None:
        self.items = [dataset.items for dataset, _ in datasets]
        found = (
            (number, place, part)
            for number, (items, (_, meant)) in enumerate(zip(self.items, datasets, strict=True))
            for place in items.distinct_media(meant).tolist()
            for part in range(len(items.sample(place).media))
        )
        self.rows = np.fromiter(found, [("items", "<i4"), ("place", "<i8"), ("part", "<i4")])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Place:  # type: ignore[override]
        which, place, part = self.rows[number].item()
        return self.items[which].root(place), self.items[which].sample(place).media[part]


class SampleDataset:
    """Items of several manifests, numbered one after the other.

    Attributes:
        cache: where features come from instead of files, once it was filled.
        augment: changes to the clips of items that are asked for with their place in the run.
        keep_decoded: MB of decoded clips that are kept in memory instead of being decoded again.

    Args:
        manifests: JSONL files, or URLs of them.
        processor: decodes and tokenizes; picklable and without weights, since it travels to the loader's workers.
        pack: group rows with the same media behind one copy of it.
        max_packed: most rows in one group.
        quarantine: reason by id of rows that are left out.

    Raises:
        ManifestError: a manifest is missing or malformed.
    """

    def __init__(
        self,
        manifests: Sequence[str | Path],
        processor: Reader,
        *,
        pack: bool = False,
        max_packed: int = 32,
        quarantine: Mapping[str, str] | None = None,
    ) -> None:
        self.items = Items(manifests, pack=pack, max_packed=max_packed, quarantine=quarantine)
        self.processor = processor
        self.cache: FeatureCache | None = None
        self.augment: Augment | None = None
        self.keep_decoded = 0.0
        self._kept: dict[Place, Clip] = {}
        self._kept_mb = 0.0
        # an item's token rows without their clips, and the runs of media tokens in them, which may change with the clip
        self._texts: dict[int, tuple[list[list[str]], Loaded]] = {}

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, item: int | tuple[int, int]) -> Loaded:
        """Decode the item's media once, make its rows, and pack them when they are several.

        Args:
            item: its number, or its number and its place in the run, which augmentation follows from.
        """
        item, drawn = item if isinstance(item, tuple) else (item, None)
        places = self.items[item]
        try:
            clips = self.clips(places[0], drawn)
            runs = [self.processor.order(clip) for clip in clips]
        except (MediaError, RowError) as error:
            return Loaded([], [self.items.bad(i, error.reason, str(error)) for i in places], len(places))
        known, kept = self._texts.get(item, (None, None))
        if kept is None or known != runs:
            kept = self._rows(places, clips, runs)
            if len(self._texts) < KEPT_TEXTS or item in self._texts:
                self._texts[item] = runs, replace(kept, rows=[replace(row, clips=[]) for row in kept.rows])
        return replace(kept, rows=[replace(row, clips=clips) for row in kept.rows])

    def _rows(self, places: list[int], clips: list[dict[str, EncoderInput]], runs: list[list[str]]) -> Loaded:
        """The rows of an item, packed when they are several, and those that cannot be made."""
        rows, bad = [], []
        shown = self.items.sample(places[0]).media
        for place in places:
            sample = self.items.sample(place)
            # rows are grouped by a hash; the media themselves have the last word
            assert sample.media == shown, f"{sample.id}: its media have the hash of other media"
            try:
                rows.append(self._row(sample, clips, runs))
            except RowError as error:
                bad.append(self.items.bad(place, error.reason, str(error)))
        rows = pack_rows(rows, self.processor.max_length) if len(rows) > 1 else rows
        return Loaded(rows, bad, len(places))

    def clips(self, place: int, drawn: int | None = None) -> list[dict[str, EncoderInput]]:
        """The media of a sample, decoded and prepared for the encoders, or as the cache has them.

        Args:
            place: of the sample. drawn: its item's place in the run; None leaves the clips as they are.

        Raises:
            MediaError: a file cannot be decoded. RowError: the model has no encoder for it.
        """
        parts, root = self.items.sample(place).media, self.items.root(place)
        if self.cache is not None:
            return [self.cache.get((root, part)) for part in parts]
        decoded = self.decode(parts, root)
        if self.augment is not None and drawn is not None:
            decoded = [self.augment(clip, drawn, n, self._some_sound) for n, clip in enumerate(decoded)]
        return [self.processor.prepare(clip) for clip in decoded]

    def _some_sound(self, which: float) -> Sound | None:
        """The first sound of a row, chosen by a number from 0 to 1; None where it has none.

        A file that cannot be decoded is none either: it is counted as bad when its own row comes.
        """
        place = int(self.items.rows[int(which * len(self.items.rows))])
        root = self.items.root(place)
        try:
            clips = self.decode(self.items.sample(place).media[:1], root)
        except (MediaError, RowError):
            return None
        return clips[0].sound if clips else None

    def read(self, parts: Sequence[MediaPart], root: Path) -> list[Prepared]:
        """Decode media parts and prepare them for the encoders."""
        return [self.processor.prepare(clip) for clip in self.decode(parts, root)]

    def decode(self, parts: Sequence[MediaPart], root: Path) -> list[Clip]:
        """Decode media parts, those of a row together, or take them from memory."""
        new = [part for part in dict.fromkeys(parts) if (root, part) not in self._kept]
        decoded = dict(zip(new, self.processor.load_clips(new, root), strict=True)) if new else {}
        for part, clip in decoded.items():
            size = clip.size / 1e6
            if self._kept_mb + size <= self.keep_decoded:
                self._kept[root, part] = clip
                self._kept_mb += size
        return [decoded[part] if part in decoded else self._kept[root, part] for part in parts]

    def _row(self, sample: Sample, clips: Sequence[dict[str, EncoderInput]], runs: Sequence[list[str]]) -> Row:
        row = self.processor.row(sample, clips, runs=runs)
        if row.num_targets == 0:
            raise RowError("no_answer", "no token of this row is trained on")
        return row
