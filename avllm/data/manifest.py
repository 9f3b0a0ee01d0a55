"""Read and write manifests (JSONL), row by row; errors name the file, the line and the field."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from avllm.data.schema import PARTS, PLAIN, Sample
from avllm.data.store.storage import local_copy, local_path, sha256
from avllm.errors import UserError


class ManifestError(UserError):
    """A manifest that cannot be read: the message names file, line and field."""


def parse_row(text: str | bytes, where: str) -> Sample:
    """One line of JSON -> Sample; a byte order mark, which editors put in front of a file, is passed over.

    Raises:
        ManifestError: not JSON, an unknown or missing field, a value out of range; ``where`` is named.
    """
    text = text.removeprefix("\ufeff") if isinstance(text, str) else text.removeprefix(codecs.BOM_UTF8)
    try:
        return Sample.model_validate_json(text)
    except ValidationError as error:
        raise ManifestError(f"{where}: {describe(error)}") from error


def describe(error: ValidationError) -> str:
    """The first mistakes of a validation error in one line: field, what was seen, what was expected."""
    lines = []
    # content that is neither parts nor plain text is both's mistake: told once, as that of parts
    mistakes = [item for item in error.errors() if PLAIN not in item["loc"]]
    for item in mistakes[:3]:
        field = ".".join(str(k) for k in item["loc"] if k != PARTS) or "row"
        seen = repr(item.get("input"))
        lines.append(f"field {field}: {item['msg']} (seen: {seen if len(seen) < 80 else seen[:77] + '...'})")
    more = len(mistakes) - len(lines)
    return "; ".join(lines) + (f"; and {more} more" if more > 0 else "")


def read_manifest(path: str | Path) -> list[Sample]:
    """All rows of a manifest.

    Raises:
        ManifestError: the file is missing or empty, a row is malformed, or an id occurs twice.
    """
    path = Path(path)
    samples: list[Sample] = []
    lines: dict[str, int] = {}
    for number, sample in iterate(path):
        if sample.id in lines:
            raise ManifestError(f"{path} line {number}: id {sample.id!r} stands already in line {lines[sample.id]}")
        lines[sample.id] = number
        samples.append(sample)
    if not samples:
        raise ManifestError(f"{path} holds no row; expected one JSON object a line")
    return samples


def iterate(path: str | Path) -> Iterator[tuple[int, Sample]]:
    """(line number from 1, Sample) of each row; blank lines are passed over. A URL's file is copied first."""
    for number, line in raw_lines(path):
        yield number, parse_row(line, f"{path} line {number}")


def raw_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, bytes) of each line that is not blank, malformed ones included."""
    file_here = local_copy(path)
    if not file_here.is_file():
        raise ManifestError(f"{path} is not a file; expected a manifest (JSONL, one sample a line)")
    with file_here.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line


def write_manifest(path: str | Path, rows: Iterable[Sample | dict[str, Any]]) -> int:
    """Write rows, one a line, whole or not at all; returns how many.

    Raises:
        StoreError: the path is a URL.
    """
    path = local_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    count = 0
    with partial.open("w", encoding="utf-8") as file:
        for row in rows:
            data = (
                row.model_dump(mode="json", exclude_defaults=False, exclude_none=True)
                if isinstance(row, Sample)
                else row
            )
            file.write(json.dumps(data, ensure_ascii=False) + "\n")
            count += 1
    partial.replace(path)
    return count


def digest(path: str | Path) -> str:
    """SHA-256 of a manifest's bytes: a run records which data it saw."""
    return sha256(local_copy(path))
