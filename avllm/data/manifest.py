"""Read and write manifests (JSONL), row by row; errors name the file, the line and the field."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from avllm.data.schema import PARTS, PLAIN, Sample
from avllm.data.store.storage import local_copy, local_path, sha256
from avllm.errors import UserError, looked_in

IN_ONE_LINE = re.compile(r" at line 1 column (\d+)$")
"""The end of a JSON error's message: the line of the manifest is another, and is named before."""


class ManifestError(UserError):
    """A manifest cannot be read; the message names file, line and field."""


def parse_row(text: str | bytes, where: str) -> Sample:
    """Parse one line of JSON; a byte order mark, which editors put before a file, is ignored.

    Args:
        text: the line.
        where: names it in errors.

    Raises:
        ManifestError: not JSON, an unknown or missing field, or a value out of range.
    """
    mark = "\ufeff" if isinstance(text, str) else codecs.BOM_UTF8
    try:
        return Sample.model_validate_json(text.removeprefix(mark))  # type: ignore[arg-type]
    except ValidationError as error:
        raise ManifestError(f"{where}: {describe(error)}", reason="malformed") from error


def describe(error: ValidationError) -> str:
    """Name the first mistakes of a validation error in one line: field, expected, seen."""
    mistakes = _mistakes(error)
    descriptions = []
    for item in mistakes[:3]:
        seen = repr(item.get("input"))
        if len(seen) >= 80:
            seen = seen[:77] + "..."
        message = IN_ONE_LINE.sub(r" at column \1", item["msg"])
        descriptions.append(f"field {_field(item)}: {message} (seen: {seen})")
    more = len(mistakes) - len(descriptions)
    if more > 0:
        descriptions.append(f"and {more} more")
    return "; ".join(descriptions)


def mistake_of(malformed: ManifestError) -> str:
    """Name the first mistake of :func:`parse_row`'s error without values, which rows may share."""
    assert isinstance(malformed.__cause__, ValidationError)
    item = _mistakes(malformed.__cause__)[0]
    return f"field {_field(item)}: {IN_ONE_LINE.sub('', item['msg'])}"


def _mistakes(error: ValidationError) -> list[ErrorDetails]:
    # Content that is neither parts nor plain text fails as both; it is reported once, as parts.
    return [item for item in error.errors() if PLAIN not in item["loc"]]


def _field(item: ErrorDetails) -> str:
    return ".".join(str(key) for key in item["loc"] if key != PARTS) or "row"


def read_manifest(path: str | Path) -> list[Sample]:
    """Read all rows of a manifest.

    Raises:
        ManifestError: the file is missing or empty, a row is malformed, or an id occurs twice.
    """
    path = Path(path)
    samples: list[Sample] = []
    lines: dict[str, int] = {}
    for number, sample in iterate(path):
        if sample.id in lines:
            raise ManifestError(
                f"{path} line {number}: id {sample.id!r} occurs already in line "
                f"{lines[sample.id]}; "
                "give each row an id",
                reason="duplicate_id",
            )
        lines[sample.id] = number
        samples.append(sample)
    if not samples:
        message = f"{path} holds no row; expected one JSON object a line"
        raise ManifestError(message, reason="empty")
    return samples


def iterate(path: str | Path) -> Iterator[tuple[int, Sample]]:
    """Yield line number (from 1) and sample of each row; blank lines are skipped.

    A URL's file is copied first.
    """
    for number, line in raw_lines(path):
        yield number, parse_row(line, f"{path} line {number}")


def raw_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """Yield line number (from 1) and bytes of each line that is not blank, also malformed ones."""
    local_file = local_copy(path)
    if not local_file.is_file():
        raise ManifestError(
            f"{path} is not a file; expected a manifest (JSONL, one sample a line)"
            f"{looked_in(path)}",
            reason="missing",
        )
    with local_file.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line


def write_manifest(path: str | Path, rows: Iterable[Sample | dict[str, Any]]) -> int:
    """Write rows, one a line, whole or not at all, and return how many.

    Raises:
        StoreError: the path is a URL.
    """
    path = local_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    count = 0
    with partial.open("w", encoding="utf-8") as file:
        for row in rows:
            if isinstance(row, Sample):
                row = row.model_dump(mode="json", exclude_defaults=False, exclude_none=True)
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    partial.replace(path)
    return count


def digest(path: str | Path) -> str:
    """Return the SHA-256 of a manifest's bytes, with which a run records its data."""
    return sha256(local_copy(path))
