"""Decode and encode each clip of a manifest once, for all questions and conditions."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from avllm.data.cache.fill import ClipEncoding, FeatureCache, encode, fill
from avllm.data.media.load import MediaError
from avllm.data.reading import MediaReader, read_batches
from avllm.data.schema import MediaPart, RowError, resolve
from avllm.errors import UserError
from avllm.evaluation.conditions import Streams, Unit

KEPT_MB = 500.0
"""Megabytes of decoded clips that are remembered for their further questions."""


@dataclass(frozen=True)
class Failure:
    """A clip that could not be read."""

    reason: str
    detail: str


@dataclass(frozen=True)
class EncodedClip:
    """One media part: which it is, and its features by stream."""

    unit: Unit
    streams: Streams


@dataclass(frozen=True)
class ClipUse:
    """A media part as a question reads it.

    Attributes:
        part: the media part.
        question: for a model whose selector chooses frames by the question; else empty, so that
            all questions about a part share its features.
    """

    part: MediaPart
    question: str = ""


@dataclass(frozen=True)
class ClipFacts:
    """Describe a clip whose features may be held no longer.

    Attributes:
        unit: which it is, and its length.
        streams: those that it has.
    """

    unit: Unit
    streams: frozenset[str]


class ClipStore:
    """Encode clips when they are needed, and hold those of the last call only.

    Args:
        model, processor: of one checkpoint.
        root: where relative paths start.
        num_workers: processes that decode; 0 decodes in this one.
        cache: features that a run left behind; what it lacks is added to it.

    Attributes:
        facts: of all clips so far that could be read.

    Raises:
        UserError: a cache, which has no place for features that depend on the question.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        root: Path | None,
        *,
        num_workers: int = 0,
        cache: FeatureCache | None = None,
    ) -> None:
        if processor.reads_question and cache is not None:
            raise UserError(
                "the model's selector chooses frames by the question; expected no --cache, which "
                "holds one set of features a clip"
            )
        self.model = model
        self.processor = processor
        self.root = root
        self.num_workers = num_workers
        self.cache = cache
        self.facts: dict[MediaPart, ClipFacts] = {}
        self._held: dict[ClipUse, EncodedClip | Failure] = {}

    def get(self, uses: Sequence[ClipUse]) -> dict[ClipUse, EncodedClip | Failure]:
        """Return the features of distinct clips, or why there are none."""
        self._held = {use: self._held[use] for use in uses if use in self._held}
        new = [use for use in uses if use not in self._held]
        if new and self.processor.reads_question:
            self._held |= encode_by_question(self.model, self.processor, new, self.root)
        elif new:
            encoded = encode_clips(
                self.model,
                self.processor,
                [use.part for use in new],
                self.root,
                num_workers=self.num_workers,
                cache=self.cache,
            )
            self._held |= {ClipUse(part): outcome for part, outcome in encoded.items()}
        for use in new:
            clip = self._held[use]
            if isinstance(clip, EncodedClip):
                self.facts[use.part] = ClipFacts(clip.unit, frozenset(clip.streams))
        return self._held


def encode_clips(
    model: Any,
    processor: Any,
    parts: Sequence[MediaPart],
    root: Path | None,
    *,
    batch_size: int = 16,
    num_workers: int = 0,
    cache: FeatureCache | None = None,
) -> dict[MediaPart, EncodedClip | Failure]:
    """Decode and encode media parts, each once.

    Args:
        model, processor: of one checkpoint.
        parts: distinct media parts.
        root: where relative paths start.
        batch_size: clips encoded at a time.
        num_workers: processes that decode; 0 decodes in this one.
        cache: features that a run left behind; what it lacks is added to it.

    Returns:
        features of each part, or why there are none.
    """
    places = [(root or Path(), part) for part in parts]
    if processor.reads_question:
        raise UserError(
            "the model's selector chooses frames by the question, and clips are encoded here once "
            "for all texts; expected a model without a selector"
        )
    num_workers = min(num_workers, len(parts))
    reader = MediaReader(processor)
    if cache is not None:
        encoding = ClipEncoding(
            reader.inputs, model.encoders, model.device, num_workers, batch_size
        )
        fill(cache, places, encoding)
        return {part: _from_cache(cache, part, root) for part in parts}
    found: dict[MediaPart, EncodedClip | Failure] = {}
    for batch in read_batches(places, reader.inputs, batch_size, num_workers):
        good: dict[MediaPart, Streams] = {}
        for one in batch:
            if isinstance(one.found, dict):
                good[parts[one.number]] = one.found
            else:
                found[parts[one.number]] = Failure(one.found.reason, str(one.found))
        with torch.no_grad():
            encoded = encode(list(good.values()), model.encoders, model.device)
        found |= {
            part: EncodedClip(_unit(part, root, streams), streams)
            for part, streams in zip(good, encoded, strict=True)
        }
    return found


def encode_by_question(
    model: Any,
    processor: Any,
    uses: Sequence[ClipUse],
    root: Path | None,
    *,
    batch_size: int = 16,
) -> dict[ClipUse, EncodedClip | Failure]:
    """Decode and encode clips whose frames are chosen by the question, each once a question.

    Args:
        model, processor: of one checkpoint.
        uses: distinct clips with their questions.
        root: where relative paths start.
        batch_size: clips encoded at a time.
    """
    reader = MediaReader(processor, KEPT_MB)
    outcomes: dict[ClipUse, EncodedClip | Failure] = {}
    for first in range(0, len(uses), batch_size):
        good: dict[ClipUse, Streams] = {}
        for use in uses[first : first + batch_size]:
            try:
                (good[use],) = reader.inputs([use.part], root, use.question)
            except (MediaError, RowError) as error:
                outcomes[use] = Failure(error.reason, str(error))
        with torch.no_grad():
            encoded = encode(list(good.values()), model.encoders, model.device)
        for use, streams in zip(good, encoded, strict=True):
            outcomes[use] = EncodedClip(_unit(use.part, root, streams), streams)
    return outcomes


def _from_cache(cache: FeatureCache, part: MediaPart, root: Path | None) -> EncodedClip | Failure:
    try:
        streams = cache.get((root or Path(), part))
    except MediaError as error:
        return Failure(error.reason, str(error))
    return EncodedClip(_unit(part, root, streams), streams)


def _unit(part: MediaPart, root: Path | None, streams: Streams) -> Unit:
    seconds = max(
        (float(item.span[:, 1].max()) for item in streams.values() if len(item.span)),
        default=0.0,
    )
    return Unit(part, str(resolve(part, root).resolve()), seconds)


def in_chunks(media: Sequence[tuple[Hashable, ...]], most: int) -> Iterator[list[int]]:
    """Yield rows' numbers in chunks of at most ``most`` distinct clips, rows of a clip together.

    Args:
        media: each row's clips.
        most: distinct clips whose features are held at a time; a row with more is a chunk.
    """
    groups: dict[tuple[Hashable, ...], list[int]] = {}
    for place, parts in enumerate(media):
        groups.setdefault(parts, []).append(place)
    chunk: list[int] = []
    held: set[Hashable] = set()
    for parts, places in groups.items():
        if chunk and len(held | set(parts)) > most:
            yield chunk
            chunk, held = [], set()
        chunk, held = chunk + places, held | set(parts)
    if chunk:
        yield chunk
