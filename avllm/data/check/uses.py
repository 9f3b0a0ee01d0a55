"""Describe how rows use a file, and read it as training does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from avllm.data.media.load import Clip, Sampling
from avllm.data.media.part import load_parts
from avllm.data.schema import AudioPart, ImagePart, MediaPart, VideoPart
from avllm.tokens import EncoderInput

Decode = Literal["headers", "sample", "full"]


class Use(NamedTuple):
    """Describe how a row uses a file: the fields of a media part beside its path."""

    kind: str
    start: float | None = None
    end: float | None = None
    sound: str = "auto"
    track: int | None = None

    @classmethod
    def of(cls, part: MediaPart) -> Use:
        """Return the use that a part makes of its file."""
        if isinstance(part, ImagePart):
            return cls("image")
        sound = part.sound if isinstance(part, VideoPart) else "auto"
        return cls(part.type, part.start, part.end, sound, part.track)

    def part(self, path: str) -> MediaPart:
        """Return the media part that uses a file in this way."""
        if self.kind == "image":
            return ImagePart.model_validate({"image": path})
        if self.kind == "audio":
            return AudioPart(audio=path, start=self.start, end=self.end, track=self.track)
        return VideoPart.model_validate(
            {
                "video": path,
                "start": self.start,
                "end": self.end,
                "sound": self.sound,
                "track": self.track,
            },
        )


def duration_of_use(use: Use, result: dict[str, Any]) -> float | None:
    """Return the seconds of a use of a file, 0 of a picture; None where they are not known."""
    if use.kind == "image":
        return 0.0
    seconds: float | None = result.get("seconds")
    return seconds


class PartReader(Protocol):
    """Read a part as training does (AVProcessor, or :class:`PlainReader`)."""

    @property
    def timeout(self) -> float:
        """Return the seconds after which decoding a part is given up."""
        ...

    def load_clips(self, parts: Sequence[MediaPart], root: Path | None) -> list[Clip]:
        """Decode media parts."""
        ...

    def prepare(self, clip: Clip) -> dict[str, EncoderInput]:
        """Prepare each stream of a clip for its encoder."""
        ...

    def order(self, clip: dict[str, EncoderInput]) -> list[str]:
        """Return the stream of each token that the clip becomes."""
        ...


@dataclass(frozen=True)
class PlainReader:
    """Read as a usual model would: eight frames, and the sound at 16 kHz.

    It gives no tokens, since there is no model.
    """

    sampling: Sampling = Sampling(num_frames=8, short_side=224)
    rate: int = 16_000
    timeout: float = 60.0

    def load_clips(self, parts: Sequence[MediaPart], root: Path | None) -> list[Clip]:
        """Decode media parts."""
        return load_parts(
            parts,
            root,
            sampling=self.sampling,
            rate=self.rate,
            timeout=self.timeout,
        )

    def prepare(self, clip: Clip) -> dict[str, EncoderInput]:
        """Return nothing, since there is no encoder."""
        return {}

    def order(self, clip: dict[str, EncoderInput]) -> list[str]:
        """Return nothing, since there is no connector."""
        return []


@dataclass(frozen=True)
class FileJob:
    """Hold a file to examine, and how rows use it."""

    path: str
    uses: tuple[Use, ...]
