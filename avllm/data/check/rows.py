"""What the rows of a manifest say, held against the schema, against each other and against test rows."""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pydantic_core import from_json

from avllm.data.manifest import ManifestError, parse_row, raw_lines
from avllm.data.schema import Sample, TextPart, TimePart

LONG_TEXT = 20_000  # characters
CAPTION_WORDS = 6  # shorter answers are shared by chance ("a dog barks")
# What conversations of other systems hold where their media stood.
PLACEHOLDER = re.compile(r"<\|?/?(?:image|video|audio|speech|sound|av|vid|im)(?:here|_?pad|_?start|_?end)?\|?>", re.I)


@dataclass(frozen=True)
class Line:
    """One line of a manifest; ``sample`` is None where it is malformed, and ``error`` says why."""

    manifest: Path
    number: int
    sample: Sample | None
    error: str
    id: str


def lines(manifests: Sequence[Path]) -> Iterator[Line]:
    """Every line that is not blank, malformed ones included.

    Raises:
        ManifestError: a manifest is no file, or empty.
    """
    for manifest in manifests:
        number = 0
        for number, text in raw_lines(manifest):
            yield _line(manifest, number, text)
        if not number:
            raise ManifestError(f"{manifest} holds no row; expected one JSON object a line. Leave it out, or fill it")


def _line(manifest: Path, number: int, text: bytes) -> Line:
    where = f"{manifest} line {number}"
    try:
        sample = parse_row(text, where)
    except ManifestError as error:
        return Line(manifest, number, None, str(error).removeprefix(f"{where}: "), _id_of(text))
    return Line(manifest, number, sample, "", sample.id)


def _id_of(text: bytes) -> str:
    """The id of a line that is no sample, where it has one."""
    try:
        data = from_json(text)  # as rows are read: json.loads falls over deep nesting and takes half surrogates
    except ValueError:  # no JSON, or no UTF-8
        return ""
    found = data.get("id") if isinstance(data, dict) else None
    return found if isinstance(found, str) else ""


def listable(identity: str) -> bool:
    """Whether an id can stand in a quarantine list: in front of a tab, on one line."""
    return identity != "" and not any(c in identity for c in "\t\n\r")


def text_problems(sample: Sample) -> Iterator[tuple[str, str]]:
    """(reason, detail) of all that is odd about a row's own words."""
    if not listable(sample.id):
        yield "unlisted_id", f"id {sample.id!r}"
    if not sample.licence:
        yield "no_licence", f"source {sample.source}"
    if not (sample.answer or "").strip():
        yield "empty_answer", f"the last turn is the {sample.messages[-1].role}'s"
    for number, message in enumerate(sample.messages):
        last_answer = number == len(sample.messages) - 1 and message.role == "assistant"
        only_text = all(isinstance(part, TextPart | TimePart) for part in message.content)
        if only_text and not message.text.strip() and not last_answer:
            yield "empty_text", f"turn {number} ({message.role}) holds nothing"
        if len(message.text) > LONG_TEXT:
            yield "long_text", f"turn {number} ({message.role}) has {len(message.text)} characters"
        found = PLACEHOLDER.search(message.text)
        if found:
            media = len(message.content) - sum(isinstance(p, TextPart | TimePart) for p in message.content)
            seen = f"turn {number} ({message.role}) holds {found[0]!r} as text, beside {media} media parts"
            yield "placeholder", seen


class Ids:
    """Which ids stand where. Of ids that stand once nothing is kept but a hash, 8 bytes a row."""

    def __init__(self) -> None:
        self._hashes = array("q")
        self._twice: set[int] = set()
        self._first: dict[str, tuple[Path, int]] = {}

    def counting(self, rows: Iterable[Line]) -> Iterator[Line]:
        """The same rows, whose ids are counted while they pass."""
        for line in rows:
            self._hashes.append(hash(line.id))
            yield line
        found, counts = np.unique(np.array(self._hashes, np.int64), return_counts=True)
        self._twice = set(found[counts > 1].tolist())
        self._hashes = array("q")

    def problems(self, line: Line) -> Iterator[tuple[str, str]]:
        """Whether the id of a line, of rows that were counted, stood somewhere before."""
        if not line.id or hash(line.id) not in self._twice:
            return
        first = self._first.setdefault(line.id, (line.manifest, line.number))
        if first != (line.manifest, line.number):
            reason = "duplicate_id" if first[0] == line.manifest else "id_in_two_manifests"
            yield reason, f"id {line.id!r} stands already in {first[0]} line {first[1]}"


@dataclass
class TestRows:
    """What training rows must not share: the ids of test rows, and their answers where these are long enough.

    Attributes:
        malformed: the lines that are no rows: what they would show is not known.
    """

    __test__ = False  # pytest takes the name for a test's

    ids: dict[str, tuple[str, str]] = field(default_factory=dict)  # id -> source, where
    captions: dict[bytes, str] = field(default_factory=dict)  # digest -> where
    malformed: list[Line] = field(default_factory=list)

    def noting(self, rows: Iterable[Line]) -> Iterator[Line]:
        """The same rows, which are taken in while they pass."""
        for line in rows:
            self._note(line)
            yield line

    def _note(self, line: Line) -> None:
        if line.sample is None:
            self.malformed.append(line)
            return
        where = f"{line.manifest} line {line.number}"
        self.ids.setdefault(line.sample.id, (line.sample.source, where))
        key = caption_key(line.sample)
        if key is not None:
            self.captions.setdefault(key, where)

    def problems(self, sample: Sample) -> Iterator[tuple[str, str]]:
        """What a training row shares with test rows."""
        source, where = self.ids.get(sample.id, ("", ""))
        if where:
            yield "test_id" if source == sample.source else "same_id_as_test", f"id {sample.id!r}: {where}"
        key = caption_key(sample)
        if key is not None and key in self.captions:
            yield "test_caption", f"{(sample.answer or '')[:80]!r}: {self.captions[key]}"


def caption_key(sample: Sample) -> bytes | None:
    """Equal for the same answer, whatever its case and punctuation; None for answers that many rows share."""
    words = re.findall(r"\w+", (sample.answer or "").casefold())
    if len(words) < CAPTION_WORDS:
        return None
    return hashlib.blake2b(" ".join(words).encode(), digest_size=16).digest()
