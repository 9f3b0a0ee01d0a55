"""Read a file of requests once: what is answered is what the file held when the command began."""

from __future__ import annotations

import codecs
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from avllm.data.boundary import one_row
from avllm.data.manifest import ManifestError, parse_row
from avllm.data.schema import RowError, Sample


@dataclass(frozen=True)
class Request:
    """One row to answer: its sample, or the error that makes it none."""

    id: str | None
    sample: Sample | None = None
    error: str | None = None


@dataclass(frozen=True)
class RequestLine:
    """One line of a file of requests.

    Attributes:
        where: file and line, for messages.
        line: its bytes, without white space around them.
        id: of the row; None where none can be read.
    """

    where: str
    line: bytes
    id: str | None

    @property
    def digest(self) -> str:
        """Return 16 digits of SHA-256 of the bytes, by which an answer names its request."""
        return hashlib.sha256(self.line).hexdigest()[:16]

    def request(self, answer: bool = False) -> Request:
        """Return the row; the error of a malformed one names file, line and field.

        Args:
            answer: keep a last answer; else the row ends with its question.
        """
        try:
            with one_row():
                sample = parse_row(self.line, self.where)
        except (ManifestError, RowError) as error:
            return Request(self.id, error=str(error))
        return Request(self.id, sample if answer else sample.question())


def read_requests(path: str | Path) -> list[RequestLine]:
    """Read the lines that are not blank.

    Raises:
        ManifestError: no such file, nothing in it, or an id that occurs twice.
    """
    path = Path(path)
    if not path.is_file():
        raise ManifestError(
            f"{path} is not a file; expected requests (JSONL, one sample a line)", reason="missing"
        )
    lines: list[RequestLine] = []
    numbers: dict[str, int] = {}
    with path.open("rb") as file:
        for number, content in enumerate(file, start=1):
            line = content.removeprefix(codecs.BOM_UTF8).strip()
            if not line:
                continue
            identity = _id_of(line)
            if identity in numbers:
                raise ManifestError(
                    f"{path} line {number}: id {identity!r} occurs already in line "
                    f"{numbers[identity]}; answers are found by their ids: give each row another",
                    reason="duplicate_id",
                )
            if identity is not None:
                numbers[identity] = number
            lines.append(RequestLine(f"{path.name} line {number}", line, identity))
    if not lines:
        raise ManifestError(
            f"{path} holds no request; expected one JSON object a line", reason="empty"
        )
    return lines


def _id_of(line: bytes) -> str | None:
    """Return the id of a line, or None when it has none that can be read."""
    try:
        row = json.loads(line)
        identity = row.get("id") if isinstance(row, dict) else None
        if isinstance(identity, str):
            identity.encode()  # the answers file is UTF-8, which has no lone surrogates
            return identity
    except (ValueError, RecursionError):  # no JSON or no UTF-8; nested too deep
        pass
    return None
