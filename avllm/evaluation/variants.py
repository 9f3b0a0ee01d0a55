"""Make clips under a condition: without a stream, or with another clip's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from avllm.evaluation.clips import ClipUse, EncodedClip
from avllm.evaluation.conditions import Condition, Partners, Streams, exchange, remove


@dataclass(frozen=True)
class Variant:
    """Hold a clip under a condition.

    Attributes:
        streams: what is left of it.
        run: the stream of each of its tokens.
    """

    streams: Streams
    run: list[str]


class Variants:
    """Make clips under a condition, each once, so that rows about a clip share its pass."""

    def __init__(
        self,
        processor: Any,
        condition: Condition,
        clips: dict[ClipUse, EncodedClip],
        partners: Partners,
    ) -> None:
        self.processor = processor
        self.condition = condition
        self.clips = clips
        self.partners = partners
        self.made: dict[tuple[ClipUse, ClipUse | None], Variant] = {}

    def touches(self, use: ClipUse, kind: str) -> bool:
        """Return whether the condition changes a clip for a question of a kind."""
        if (kind, use.part) in self.partners:
            return True
        return use in self.clips and self._removed(use) != []

    def of(self, use: ClipUse, kind: str) -> Variant:
        """Return a clip under the condition, for a question of a kind."""
        partner = self.partners.get((kind, use.part))
        key = (use, None if partner is None else ClipUse(partner, use.question))
        if key not in self.made:
            self.made[key] = self._make(*key)
        return self.made[key]

    def _make(self, use: ClipUse, partner: ClipUse | None) -> Variant:
        clip = self.clips[use].streams
        swap = self.condition.swap
        streams = remove(clip, self._removed(use))
        if partner is not None and swap is not None:
            streams = exchange(clip, self.clips[partner].streams, self.processor.streams_of(swap))
        return Variant(streams, self.processor.order(streams))

    def _removed(self, use: ClipUse) -> list[str]:
        """Return the streams of a clip that the condition removes."""
        removed: list[str] = []
        for medium in self.condition.removed:
            removed += self.processor.streams_of(medium)
        return [stream for stream in self.clips[use].streams if stream in removed]
