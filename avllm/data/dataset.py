"""Manifests as a map from an item's number to its token rows: decoding and tokenizing, no order and no randomness.

An item is one row of a manifest, or, when packing, the rows that ask about the same media. A row that cannot be used
comes out as a named :class:`Bad`, never as another row in its place.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from avllm.data.manifest import read_manifest
from avllm.data.media import MediaError
from avllm.data.packing import pack_rows
from avllm.data.schema import Sample


@dataclass(frozen=True)
class Bad:
    """A row that was left out.

    Attributes:
        reason: ``missing``, ``zero_byte``, ``undecodable``, ... (see ``MediaError``), ``too_long``, ``empty_text``,
            ``no_answer``.
        detail: what was seen.
    """

    id: str
    source: str
    manifest: str
    reason: str
    detail: str

    def to_dict(self) -> dict[str, str]:
        """As ``skipped.jsonl`` holds it."""
        return asdict(self)


@dataclass
class Loaded:
    """What one item became: token rows (fewer than ``seen`` where rows were packed), and the rows that were left out."""

    rows: list[Any]
    bad: list[Bad]
    seen: int


class Reader(Protocol):
    """What the dataset wants of a processor (AVProcessor has it)."""

    def load_clips(self, sample: Sample, root: Path | None) -> list[Any]:
        """Decode the media of a sample."""
        ...

    def row(self, sample: Sample, clips: list[Any]) -> Any:
        """Tokenize a sample."""
        ...


class RowError(ValueError):
    """A row that is well-formed and still of no use for training; ``reason`` is a word to count by."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class SampleDataset:
    """Items of several manifests, numbered one after the other.

    Args:
        manifests: JSONL files.
        processor: decodes and tokenizes; picklable and without weights, since it travels to the loader's workers.
        max_length: a longer row is bad: something would have to be cut away.
        pack: group rows with the same media behind one copy of it.
        max_packed: most rows in one group.

    Raises:
        ManifestError: a manifest is missing or malformed.
    """

    def __init__(
        self,
        manifests: Sequence[str | Path],
        processor: Reader,
        *,
        max_length: int,
        pack: bool = False,
        max_packed: int = 32,
    ) -> None:
        self.processor, self.max_length = processor, max_length
        self.manifests = [Path(m) for m in manifests]
        self.samples: list[tuple[int, Sample]] = []
        self.items: list[list[int]] = []
        self.sizes: list[int] = []
        for number, manifest in enumerate(self.manifests):
            first = len(self.samples)
            self.samples += [(number, sample) for sample in read_manifest(manifest)]
            places = list(range(first, len(self.samples)))
            groups = self._by_media(places, max_packed) if pack else [[i] for i in places]
            self.items += groups
            self.sizes.append(len(groups))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, item: int) -> Loaded:
        """Decode the item's media once, make its rows, and pack them when they are several."""
        places = self.items[item]
        manifest, first = self.samples[places[0]]
        root = self.manifests[manifest].parent
        try:
            clips = self.processor.load_clips(first, root)
        except MediaError as error:
            return Loaded([], [self._bad(i, error.reason, str(error)) for i in places], len(places))
        rows, bad = [], []
        for place in places:
            try:
                rows.append(self._row(self.samples[place][1], clips))
            except RowError as error:
                bad.append(self._bad(place, error.reason, str(error)))
        rows = pack_rows(rows, self.max_length, self.processor.media_ids) if len(rows) > 1 else rows
        return Loaded(rows, bad, len(places))

    def _row(self, sample: Sample, clips: list[Any]) -> Any:
        check_text(sample)
        row = self.processor.row(sample, clips)
        if len(row.input_ids) > self.max_length:
            detail = f"{len(row.input_ids)} tokens; max_length is {self.max_length} and the answer would be cut away"
            raise RowError("too_long", detail)
        if not bool((row.labels >= 0).any()):
            raise RowError("no_answer", "no token of this row is trained on")
        return row

    def _bad(self, place: int, reason: str, detail: str) -> Bad:
        manifest, sample = self.samples[place]
        return Bad(sample.id, sample.source, str(self.manifests[manifest]), reason, detail)

    def _by_media(self, places: list[int], largest: int) -> list[list[int]]:
        groups: dict[str, list[list[int]]] = {}
        for place in places:
            sample = self.samples[place][1]
            key = media_key(sample)
            stacks = groups.setdefault(key if sample.media else f"row {place}", [[]])
            if len(stacks[-1]) == largest:
                stacks.append([])
            stacks[-1].append(place)
        return [stack for stacks in groups.values() for stack in stacks]


def media_key(sample: Sample) -> str:
    """Equal for samples that show the same media in the same order."""
    return json.dumps([part.model_dump(mode="json") for part in sample.media], sort_keys=True)


def check_text(sample: Sample) -> None:
    """Refuse a row that teaches nothing.

    Raises:
        RowError: no assistant turn, or an empty one.
    """
    answers = [m.text for m in sample.messages if m.role == "assistant"]
    if not answers:
        raise RowError("no_answer", "the row has no assistant turn")
    if not all(text.strip() for text in answers):
        raise RowError("empty_text", f"an assistant turn is {min(answers, key=len)!r}")
