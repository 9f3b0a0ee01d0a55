"""Count the rows of manifests by source, kind and modality, with their seconds and tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from avllm.data.boundary import one_row
from avllm.data.check.file import can_be_used
from avllm.data.check.files import ExamineOptions, Files, Uses, gather, media_of
from avllm.data.check.reasons import REASONS
from avllm.data.check.rows import Line, lines
from avllm.data.check.run import TokenCounter
from avllm.data.check.uses import Use, duration_of_use
from avllm.data.manifest import ManifestError
from avllm.data.media.load import MediaError
from avllm.data.schema import RowError, Sample, VideoPart

Interval = tuple[str, float | None, float | None]
"""A file, and the seconds at which a row's part of it begins and ends."""


@dataclass
class RowTotals:
    """Add up the rows of one source, kind or modality.

    Attributes:
        rows: how many.
        words: of the answers.
        seconds: of media; an interval of a file counts once, however many rows show it.
        unknown: media parts whose length is not known.
        sound: videos with a sound track, of the opened files whose sound is not switched off.
        no_sound: videos without one.
        tokens: of the rows that can be trained on.
        refused: rows that cannot be trained on, which have no tokens.
    """

    rows: int = 0
    words: int = 0
    seconds: float = 0.0
    unknown: int = 0
    sound: int = 0
    no_sound: int = 0
    tokens: int = 0
    refused: int = 0

    def add(self, other: RowTotals) -> None:
        """Add other rows."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class Stats:
    """Hold the totals of manifests.

    Attributes:
        total: of all rows.
        by: totals by ``manifest``, ``source``, ``kind`` and ``modality``, then by name.
        malformed: lines that are no rows.
        refused: rows that have no tokens, by reason (of ``REASONS``).
        media_files: distinct files.
        counted: the intervals of files whose seconds each group has already.
    """

    total: RowTotals = field(default_factory=RowTotals)
    by: dict[str, dict[str, RowTotals]] = field(default_factory=dict)
    malformed: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    media_files: int = 0
    counted: dict[str, set[Interval]] = field(default_factory=dict)

    def add(
        self, row: RowTotals, media: Mapping[Interval, float], names: Mapping[str, str]
    ) -> None:
        """Add a row.

        Args:
            row: its totals, without seconds.
            media: seconds by the interval that the row shows.
            names: by group (``source``, ``kind``, ...), the name under which it is counted.
        """
        self._add_to(self.total, "", row, media)
        for group, name in names.items():
            totals = self.by.setdefault(group, {}).setdefault(name, RowTotals())
            self._add_to(totals, f"{group}\t{name}", row, media)

    def _add_to(
        self, totals: RowTotals, key: str, row: RowTotals, media: Mapping[Interval, float]
    ) -> None:
        totals.add(row)
        counted = self.counted.setdefault(key, set())
        for interval, seconds in media.items():
            if interval not in counted:
                totals.seconds += seconds
        counted.update(media)

    def to_dict(self) -> dict[str, Any]:
        """Return the totals, JSON-able."""
        content: dict[str, Any] = {
            "total": vars(self.total),
            "malformed": self.malformed,
            "refused": dict(self.refused),
            "files": self.media_files,
        }
        for group, totals in self.by.items():
            content[group] = {name: vars(total) for name, total in totals.items()}
        return content


def modality(sample: Sample) -> str:
    """Return ``video``, ``video (no sound)``, ``audio``, ``image``, several, or ``text``."""
    counts: Counter[str] = Counter()
    for part in sample.media:
        use = Use.of(part)
        mute = use.kind == "video" and use.sound == "off"
        counts["video (no sound)" if mute else use.kind] += 1
    names = [f"{count} {kind}" if count > 1 else kind for kind, count in sorted(counts.items())]
    return " + ".join(names) or "text"


def stats(
    manifests: Sequence[Path],
    *,
    options: ExamineOptions | None = None,
    tokens: TokenCounter | None = None,
) -> Stats:
    """Count rows, media and text.

    Args:
        manifests: JSONL files.
        options: how files are opened for the length of clips; None opens none, and then only the
            length of intervals is known.
        tokens: counts a row's tokens; a model's processor also needs ``options`` for the media's.
            Rows that it finds too long are refused, so it should have no limit.

    Raises:
        ManifestError: a manifest is no file, or empty.
    """
    uses = gather(_rows(manifests))
    result = Stats(media_files=len(uses))
    files: Files | None = None
    if options is not None:
        files = Files(options, None)
        files.examine(uses)
    for line in _rows(manifests):
        if line.sample is None:
            result.malformed += 1
            continue
        sample = line.sample
        media: list[dict[str, Any]] = []
        durations: list[float | None] = []
        seconds: dict[Interval, float] = {}
        for path, use in media_of(line):
            use_result = _result_of(files, uses, path, use)
            media.append(use_result)
            durations.append(duration_of_use(use, use_result))
            seconds[path, use.start, use.end] = use_result.get("seconds") or 0.0
        row = _totals_of_row(sample, media)
        if tokens is not None:
            try:
                with one_row():
                    row.tokens = _count_tokens(sample, media, durations, tokens)
            except (MediaError, RowError) as error:
                row.refused = 1
                result.refused[error.reason] += 1
        groups = {
            "manifest": str(line.manifest),
            "source": sample.source,
            "kind": sample.kind or "(none)",
            "modality": modality(sample),
        }
        result.add(row, seconds, groups)
    return result


def _rows(manifests: Sequence[Path]) -> Iterator[Line]:
    """Yield the lines of manifests, none of which may be empty."""
    for line in lines(manifests):
        if line.reason == "empty_manifest":
            raise ManifestError(line.error, reason="empty")
        yield line


def _result_of(files: Files | None, uses: Uses, path: str, use: Use) -> dict[str, Any]:
    """Return the result of a use of a file, or, of files not opened, the length of its interval."""
    if files is not None:
        result: dict[str, Any] = files[path]["uses"][uses[path].index(use)]
        return result
    if use.end is None:
        return {}
    return {"seconds": use.end - (use.start or 0.0)}


def _totals_of_row(sample: Sample, media: list[dict[str, Any]]) -> RowTotals:
    """Return the totals of one row, without its tokens and seconds."""
    row = RowTotals(rows=1, words=len((sample.answer or "").split()))
    for part, use in zip(sample.media, media, strict=True):
        if use.get("seconds") is None and part.type != "image":
            row.unknown += 1
        if isinstance(part, VideoPart) and part.sound != "off" and "problems" in use:
            mute = any(reason in ("no_sound_track", "no_audio") for reason, _ in use["problems"])
            if mute:
                row.no_sound += 1
            elif can_be_used(use):
                row.sound += 1
    return row


def _count_tokens(
    sample: Sample,
    media: list[dict[str, Any]],
    durations: list[float | None],
    tokens: TokenCounter,
) -> int:
    """Return the tokens of a row.

    Raises:
        RowError: training would leave the row out, for its media or for its text.
    """
    for use in media:
        for reason, detail in use.get("problems", []):
            if REASONS[reason].severity == "error":
                raise RowError(reason, detail)
    return tokens(sample, [use.get("tokens", {}) for use in media], durations)
