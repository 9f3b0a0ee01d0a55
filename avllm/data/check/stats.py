"""What manifests hold, in numbers: rows by source, kind and modality, seconds, tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from avllm.data.check.file import Use, can_be_used
from avllm.data.check.files import Files, Looking, Uses, gather, media_of
from avllm.data.check.reasons import REASONS
from avllm.data.check.rows import lines
from avllm.data.check.run import Tokens
from avllm.data.schema import RowError, Sample, VideoPart


@dataclass
class Share:
    """What one source, kind or modality has of the rows.

    Attributes:
        rows: how many. words: of the answers.
        seconds: of media; unknown: media parts whose length is not known.
        sound, no_sound: videos whose sound is wanted, with a sound track and without; of the files that were opened.
        tokens: of the rows that can be trained on; refused: rows that cannot, which have none.
    """

    rows: int = 0
    words: int = 0
    seconds: float = 0.0
    unknown: int = 0
    sound: int = 0
    no_sound: int = 0
    tokens: int = 0
    refused: int = 0

    def add(self, other: Share) -> None:
        """Add up."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class Stats:
    """Shares by ``manifest``, ``source``, ``kind`` and ``modality``, and what all have together.

    Attributes:
        malformed: lines that are no rows. refused: rows that have no tokens, by reason (of ``REASONS``).
    """

    total: Share = field(default_factory=Share)
    by: dict[str, dict[str, Share]] = field(default_factory=dict)
    malformed: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    media_files: int = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        by = {group: {name: vars(share) for name, share in shares.items()} for group, shares in self.by.items()}
        bad = {"malformed": self.malformed, "refused": dict(self.refused)}
        return {"total": vars(self.total), **bad, "files": self.media_files, **by}


def modality(sample: Sample) -> str:
    """``video``, ``video (no sound)``, ``audio``, ``image``, several of them, or ``text``."""
    kinds = Counter(
        "video (no sound)" if use.kind == "video" and use.sound == "off" else use.kind
        for use in map(Use.of, sample.media)
    )
    return " + ".join(f"{n} {kind}" if n > 1 else kind for kind, n in sorted(kinds.items())) or "text"


def stats(manifests: Sequence[Path], *, looking: Looking | None = None, tokens: Tokens | None = None) -> Stats:
    """Count rows, media and text.

    Args:
        manifests: JSONL files.
        looking: how files are opened for the length of clips; None opens none, and knows only intervals.
        tokens: counts a row's tokens; with a model's processor the media's tokens have to be looked up too. Rows that
            it takes for too long are refused: let it have no limit.

    Raises:
        ManifestError: a manifest is no file.
    """
    uses = gather(lines(manifests))
    found, files = Stats(media_files=len(uses)), None
    if looking is not None:
        files = Files(looking, None)
        files.look(uses)
    for line in lines(manifests):
        if line.sample is None:
            found.malformed += 1
            continue
        sample = line.sample
        media = [_seen(files, uses, path, use) for path, use in media_of(line)]
        share = _share(sample, media)
        if tokens is not None:
            try:
                share.tokens = _tokens(sample, media, tokens)
            except RowError as error:
                share.refused = 1
                found.refused[error.reason] += 1
        found.total.add(share)
        names = {"source": sample.source, "kind": sample.kind or "(none)", "modality": modality(sample)}
        for group, name in {"manifest": str(line.manifest), **names}.items():
            found.by.setdefault(group, {}).setdefault(name, Share()).add(share)
    return found


def _seen(files: Files | None, uses: Uses, path: str, use: Use) -> dict[str, Any]:
    if files is not None:
        known: dict[str, Any] = files[path]["uses"][uses[path].index(use)]
        return known
    return {} if use.end is None else {"seconds": use.end - (use.start or 0.0)}


def _share(sample: Sample, media: list[dict[str, Any]]) -> Share:
    seconds = [use.get("seconds") for use in media]
    share = Share(rows=1, words=len((sample.answer or "").split()))
    share.seconds = sum(s for s in seconds if s is not None)
    share.unknown = sum(s is None for s, part in zip(seconds, sample.media, strict=True) if part.type != "image")
    for part, use in zip(sample.media, media, strict=True):
        if isinstance(part, VideoPart) and part.sound != "off" and "problems" in use:
            mute = any(reason in ("no_sound_track", "no_audio") for reason, _ in use["problems"])
            share.no_sound += mute
            share.sound += can_be_used(use) and not mute
    return share


def _tokens(sample: Sample, media: list[dict[str, Any]], tokens: Tokens) -> int:
    """Tokens of a row.

    Raises:
        RowError: training would leave it out: for its media, or for what it says.
    """
    for reason, detail in (problem for use in media for problem in use.get("problems", [])):
        if REASONS[reason].severity == "error":
            raise RowError(reason, detail)
    return tokens(sample, [use.get("tokens", {}) for use in media])
