"""Check, write and count the rows and drops of a recipe, one by one."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from avllm.data.manifest import describe
from avllm.data.schema import Sample
from avllm.recipes.about import Dataset
from avllm.recipes.media import EMPTY, MISSING, lacking
from avllm.recipes.output import Output
from avllm.recipes.rows import Drop, RecipeRow

MEDIA = ("video", "audio", "image")


@dataclass
class RecipeReport:
    """Counts of a recipe's run.

    Attributes:
        rows: written rows, by split.
        dropped: rows left out, by reason.
        missing_files: media files that are missing or empty.
        numbered_ids: ids that got a number added, since they occurred before.
    """

    rows: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    missing_files: int = 0
    numbered_ids: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as ``recipe.json`` holds them, sorted by name."""
        return {
            "rows": dict(sorted(self.rows.items())),
            "dropped": dict(sorted(self.dropped.items())),
            "missing_files": self.missing_files,
            "numbered_ids": self.numbered_ids,
        }


class RowWriter:
    """Writes what a recipe yields into its output.

    Args:
        about: the data set, whose licence goes into rows that name none.
        name: the ``source`` of rows that name none.
        source: the data set's folder.
        output: the files of this run.
    """

    def __init__(self, about: Dataset, name: str, source: Path, output: Output) -> None:
        self.about = about
        self.name = name
        self.source = source.resolve()
        self.output = output
        self.report = RecipeReport()
        self.first_drop: Drop | None = None
        self._last_number: dict[str, int] = {}  # by id: the number that was added last
        self._missing: set[str] = set()
        self._to_source = relative_path(self.source, output.folder)

    def write(self, item: RecipeRow | Drop) -> None:
        """Write a row, or leave it out where its media lack; write down a drop."""
        if isinstance(item, RecipeRow):
            self._write_row(item)
            return
        if item.reason in (MISSING, EMPTY):
            self._note_missing([item.detail])
        self._leave_out(item)

    def why_nothing(self) -> str:
        """Return the reasons why no row was written, as the end of a message."""
        if self.first_drop is None:
            return "; nothing was there"
        first = self.first_drop
        folder = self.output.folder
        counts = [f"{count:,} {reason}" for reason, count in sorted(self.report.dropped.items())]
        message = (
            f"; left out: {', '.join(counts)}; the first: {first.where}: "
            f"{first.detail or first.reason}; all are in {folder / 'dropped.jsonl'}"
        )
        if self.report.missing_files:
            count = self.report.missing_files
            path = folder / "missing.txt"
            message += f"; {count:,} media files, missing or empty, are named in {path}"
        return message

    def _leave_out(self, drop: Drop) -> None:
        self.report.dropped[drop.reason] += 1
        self.first_drop = self.first_drop or drop
        self.output.line("dropped.jsonl", asdict(drop))

    def _write_row(self, row: RecipeRow) -> None:
        data = {"source": self.name, "licence": self.about.licence} | row.sample
        where = str(data.get("id") or "a row without id")
        try:
            sample = Sample.model_validate(data)
        except ValidationError as error:
            self._leave_out(Drop("invalid_row", where, describe(error)))
            return
        reasons = self._lacking_media(sample)
        if reasons:
            self._note_missing(reasons)
            reason = MISSING if MISSING in reasons.values() else EMPTY
            self._leave_out(Drop(reason, where, ", ".join(reasons)))
            return
        data = sample.model_dump(mode="json", exclude_unset=True, exclude_none=True)
        data = {"id": self._unique(sample.id)} | without(data, "id")
        for message in data["messages"]:
            message["content"] = [self._manifest_part(part) for part in message["content"]]
        self.output.line(f"{row.split}.jsonl", data)
        self.report.rows[row.split] += 1

    def _lacking_media(self, sample: Sample) -> dict[str, str]:
        """Return the reason of each media path that is missing or empty."""
        reasons = {}
        for part in sample.media:
            reason = lacking(os.path.join(self.source, part.path))
            if reason is not None:
                reasons[part.path] = reason
        return reasons

    def _note_missing(self, paths: Iterable[str]) -> None:
        """Write each missing or empty file down once."""
        for path in paths:
            if path not in self._missing:
                self._missing.add(path)
                self.report.missing_files += 1
                self.output.open("missing.txt").write(path + "\n")

    def _unique(self, sample_id: str) -> str:
        """Return the id, with a number added where it occurred before."""
        unique_id = sample_id
        number = self._last_number.get(sample_id, 1)
        while unique_id in self._last_number:
            number += 1
            unique_id = f"{sample_id}~{number}"
        self._last_number[sample_id] = number
        self._last_number.setdefault(unique_id, 1)
        self.report.numbered_ids += unique_id != sample_id
        return unique_id

    def _manifest_part(self, part: dict[str, Any]) -> dict[str, Any]:
        """Return a content part; the path of a media part is the one for the manifest."""
        kind = part["type"]
        if kind not in MEDIA:
            return part
        return {"type": kind, kind: self._manifest_path(part[kind])} | without(part, kind)

    def _manifest_path(self, path: str) -> str:
        """Return a path relative to the manifest's folder, where there is such a path."""
        if os.path.isabs(path):
            return relative_path(Path(path), self.output.folder)
        return Path(os.path.normpath(os.path.join(self._to_source, path))).as_posix()


def without(fields: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the fields but one."""
    return {key: value for key, value in fields.items() if key != name}


def relative_path(path: Path, folder: Path) -> str:
    """Return a path relative to a folder; absolute where it is on another drive."""
    try:
        return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()
    except ValueError:
        return path.resolve().as_posix()
