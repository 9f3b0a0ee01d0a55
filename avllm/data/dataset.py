"""Decode and tokenize the items of manifests, by number, without order and without randomness.

An item is one row of a manifest, or, when packing, the rows that ask about the same media. A row
that cannot be used comes out as a named :class:`Bad`, never as another row in its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from avllm.data.augment import Augment
from avllm.data.boundary import one_row
from avllm.data.cache.fill import FeatureCache
from avllm.data.items import Bad, Items
from avllm.data.media.load import Clip, MediaError, Sound
from avllm.data.packing import share_media
from avllm.data.reading import MediaReader, Place, Prepared
from avllm.data.row import Row
from avllm.data.row_makers.base import RowMaker
from avllm.data.row_makers.whole import Whole
from avllm.data.schema import MediaPart, RowError, Sample
from avllm.tokens import duration_of

REMEMBERED_TEXTS = 5_000  # items whose token rows each loader process remembers, about 10 kB each


_Form = tuple[list[list[str]], list[float | None]]
"""Of an item's clips: the runs of their tokens, and their seconds."""


@dataclass
class Loaded:
    """Token rows of an item (fewer than ``seen`` where rows were packed), and the bad rows."""

    rows: list[Row]
    bad: list[Bad]
    seen: int


class RowProcessor(Protocol):
    """Tokenize rows and prepare clips, as a dataset needs it (AVProcessor does)."""

    max_length: int

    @property
    def reads_question(self) -> bool:
        """True where clips are chosen by the question: no question can use those of another."""
        ...

    def load_clips(self, parts: Sequence[MediaPart], root: Path | None) -> list[Clip]:
        """Decode the media parts of a row, each interval of a file once."""
        ...

    def prepare(self, clip: Clip, question: str = "") -> Prepared:
        """Prepare each stream of a clip for its encoder."""
        ...

    def order(self, clip: Prepared, variant: str | None = None) -> list[str]:
        """Return the streams' names in the order of the LLM's sequence, one a token."""
        ...

    def row(
        self,
        sample: Sample,
        clips: Sequence[Prepared],
        *,
        runs: Sequence[list[str]] | None = None,
        last_only: bool = False,
        variant: str | None = None,
        marks: Sequence[int] | None = None,
    ) -> Row:
        """Tokenize a sample; ``runs`` is :meth:`order` of each clip."""
        ...


class MediaPlaces(Sequence[Place]):
    """Media parts of some datasets, as the feature cache addresses them; shared ones come once.

    They are read from the manifests when asked for: a million of them as objects would take a
    gigabyte.

    Args:
        datasets: and of each which items are meant, ``(items,)`` bool; None = all.
    """

    def __init__(self, datasets: Sequence[tuple[SampleDataset, np.ndarray | None]]) -> None:
        self.items = [dataset.items for dataset, _ in datasets]
        chosen = [meant for _, meant in datasets]
        columns = [("items", "<i4"), ("place", "<i8"), ("part", "<i4")]
        self.rows = np.fromiter(self._addresses(chosen), columns)

    def _addresses(self, chosen: Sequence[np.ndarray | None]) -> Iterator[tuple[int, int, int]]:
        """Yield the numbers of dataset, row and media part, of the chosen items of each dataset."""
        for number, (items, meant) in enumerate(zip(self.items, chosen, strict=True)):
            for place in items.distinct_media(meant).tolist():
                for part in range(len(items.sample(place).media)):
                    yield number, place, part

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Place:  # type: ignore[override]
        which, place, part = self.rows[number].item()
        return self.items[which].root(place), self.items[which].sample(place).media[part]


@dataclass
class _ItemMedia:
    """The media of an item: decoded, prepared, and laid out as runs of tokens.

    Attributes:
        decoded: empty where the features come from a cache.
        runs: the streams' names of each clip's tokens.
    """

    parts: list[MediaPart]
    root: Path
    decoded: list[Clip]
    clips: list[Prepared]
    runs: list[list[str]]


class SampleDataset:
    """Items of several manifests, numbered one after the other.

    Attributes:
        reader: decodes and prepares media.
        cache: where features come from instead of files, once it was filled.
        augment: changes to the clips of items that are asked for with their place in the run.

    Args:
        manifests: JSONL files, or URLs of them.
        processor: decodes and tokenizes; picklable and without weights, since it travels to the
            loader's workers.
        maker: turns a sample into rows; one row with all turns without it.
        pack: group rows with the same media after one copy of it.
        max_packed: most rows in one group.
        quarantine: reason by id of rows that are left out.
        keep_decoded: megabytes of decoded clips that are kept in memory.

    Raises:
        ManifestError: a manifest is missing or malformed.
    """

    def __init__(
        self,
        manifests: Sequence[str | Path],
        processor: RowProcessor,
        *,
        maker: RowMaker | None = None,
        pack: bool = False,
        max_packed: int = 32,
        quarantine: Mapping[str, str] | None = None,
        keep_decoded: float = 0.0,
    ) -> None:
        self.items = Items(manifests, pack=pack, max_packed=max_packed, quarantine=quarantine)
        self.processor = processor
        self.reader = MediaReader(processor, keep_decoded)
        self.maker = maker or Whole()
        self.pack = pack
        self.cache: FeatureCache | None = None
        self.augment: Augment | None = None
        # An item's token rows without their clips, and the runs in them, which may change with the
        # clip.
        self._texts: dict[int, tuple[_Form, Loaded]] = {}

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, item: int | tuple[int, int]) -> Loaded:
        """Decode the item's media once, make its rows, and pack them when that is asked for.

        Args:
            item: its number, or its number and its place in the run, which random choices follow
                from.
        """
        number, drawn = item if isinstance(item, tuple) else (item, None)
        places = self.items[number]
        try:
            media = self._media(places[0], drawn)
        except (MediaError, RowError) as error:
            bad = [self.items.bad(place, error.reason, str(error)) for place in places]
            return Loaded([], bad, len(places))
        if self.maker.varies or self.processor.reads_question:
            return self._rows(places, media, drawn)
        # Texts name times as the clip's duration has them, and augmentation may change both.
        form = (media.runs, [duration_of(clip) for clip in media.clips])
        remembered, loaded = self._texts.get(number, (None, None))
        if loaded is None or remembered != form:
            loaded = self._rows(places, media, drawn)
            if not _has_own_clips(loaded, media):
                return loaded
            if not loaded.bad and (len(self._texts) < REMEMBERED_TEXTS or number in self._texts):
                without_clips = [replace(row, clips=[{}] * len(row.clips)) for row in loaded.rows]
                self._texts[number] = form, replace(loaded, rows=without_clips)
        rows = [replace(row, clips=media.clips[: len(row.clips)]) for row in loaded.rows]
        return replace(loaded, rows=rows)

    def _media(self, place: int, drawn: int | None) -> _ItemMedia:
        """Read the media of a sample."""
        parts = self.items.sample(place).media
        root = self.items.root(place)
        decoded: list[Clip] = []
        clips: list[Prepared] = []
        if self.cache is not None:
            # Outside of the boundary: what else fails here is the cache, which all rows share.
            clips = [self.cache.get((root, part)) for part in parts]
        with one_row():
            if self.cache is None:
                decoded = self.decode(place, drawn)
                if not self.processor.reads_question:
                    clips = [self.processor.prepare(clip) for clip in decoded]
            runs = [self.processor.order(clip) for clip in clips]
        return _ItemMedia(parts, root, decoded, clips, runs)

    def decode(self, place: int, drawn: int | None = None) -> list[Clip]:
        """Decode the media of a sample, changed as ``augment`` says.

        Args:
            place: of the sample.
            drawn: its item's place in the run; None leaves the clips unchanged.

        Raises:
            MediaError: a file cannot be decoded. RowError: the model has no encoder for it.
        """
        decoded = self.reader.clips(self.items.sample(place).media, self.items.root(place))
        if self.augment is None or drawn is None:
            return decoded
        return [self.augment(clip, drawn, n, self._some_sound) for n, clip in enumerate(decoded)]

    def _some_sound(self, which: float) -> Sound | None:
        """Return the first sound of a row, chosen by a number from 0 to 1; None where it has none.

        A file that cannot be decoded gives none either: it is counted as bad when its own row
        comes.
        """
        place = int(self.items.rows[int(which * len(self.items.rows))])
        try:
            with one_row():
                first = self.items.sample(place).media[:1]
                clips = self.reader.clips(first, self.items.root(place))
        except (MediaError, RowError):
            return None
        return clips[0].sound if clips else None

    def _rows(self, places: list[int], media: _ItemMedia, drawn: int | None) -> Loaded:
        """Make the rows of an item, packed where asked, and name those that cannot be made."""
        rows: list[Row] = []
        bad: list[Bad] = []
        for place in places:
            sample = self.items.sample(place)
            # Rows are grouped by a hash of their media: compare the media themselves.
            assert sample.media == media.parts, (
                f"{sample.id}: its media have the hash of other media"
            )
            make = _MakeRow(self.processor, self.reader, media)
            try:
                with one_row():
                    made = self.maker.rows(sample, make, drawn)
            except (MediaError, RowError) as error:
                bad.append(self.items.bad(place, error.reason, str(error)))
            else:
                rows += made
        if self.pack and len(rows) > 1:
            packed = []
            for variant in dict.fromkeys(row.variant for row in rows):
                alike = [row for row in rows if row.variant == variant]
                packed += share_media(alike, self.processor.max_length)
            rows = packed
        return Loaded(rows, bad, len(places))


def _has_own_clips(loaded: Loaded, media: _ItemMedia) -> bool:
    """Return True if rows hold their item's clips unchanged: marks of regions change some."""
    for row in loaded.rows:
        for own, clip in zip(media.clips, row.clips, strict=False):
            if own is not clip:
                return False
    return True


class _MakeRow:
    """Make rows about an item's media, and about other clips where a row maker names some."""

    def __init__(self, processor: RowProcessor, reader: MediaReader, media: _ItemMedia) -> None:
        self.processor = processor
        self.reader = reader
        self.media = media

    def __call__(
        self,
        sample: Sample,
        *,
        last_only: bool = False,
        variant: str | None = None,
        marks: Sequence[int] | None = None,
    ) -> Row:
        runs = None
        own = self.media.parts[: len(sample.media)] == sample.media
        if self.processor.reads_question:
            decoded = (
                self.media.decoded if own else self.reader.clips(sample.media, self.media.root)
            )
            clips = [
                self.processor.prepare(clip, sample.last_question)
                for clip in decoded[: len(sample.media)]
            ]
        elif own:
            clips = self.media.clips[: len(sample.media)]
            runs = self.media.runs[: len(sample.media)] if variant is None else None
        else:
            clips = self.reader.inputs(sample.media, self.media.root)
        row = self.processor.row(
            sample, clips, runs=runs, last_only=last_only, variant=variant, marks=marks
        )
        if row.num_targets == 0:
            raise RowError("no_answer", "no token of this row is trained on")
        return row
