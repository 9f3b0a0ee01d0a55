"""Check the rows of a manifest against the schema, against each other and against test rows."""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic_core import from_json

from avllm.data.check.reasons import Problem
from avllm.data.manifest import ManifestError, mistake_of, parse_row, raw_lines
from avllm.data.schema import Sample, WordPart

LONG_TEXT = 20_000  # characters
CAPTION_WORDS = 6  # shorter answers are shared by chance ("a dog barks")
# Placeholders that other systems write into conversations where media belong.
PLACEHOLDER = re.compile(
    r"<\|?/?(?:image|video|audio|speech|sound|av|vid|im)(?:here|_?pad|_?start|_?end)?\|?>",
    re.IGNORECASE,
)

LETTER = re.compile(r"^\s*[(\[]?([A-Za-z])(?:[)\].:,]+\s*|\s*$)")
"""The letter of a choice at the begin of a text: ``B``, ``(b)``, ``B. a dog``."""


@dataclass(frozen=True)
class Line:
    """Hold one line of a manifest.

    Attributes:
        manifest: its file.
        number: of the line, from 1.
        sample: None where the line is malformed.
        error: why it is malformed, or "".
        id: of the row; "" where a malformed line has none.
        reason: of the error: ``malformed``, or ``empty_manifest`` for a manifest without lines,
            which has number 0; or "".
        mistake: the error without values, so that rows can be counted by it.
    """

    manifest: Path
    number: int
    sample: Sample | None
    error: str
    id: str
    reason: str = ""
    mistake: str = ""

    @property
    def location(self) -> str:
        """Name manifest and line."""
        return f"{self.manifest} line {self.number}"


def lines(manifests: Sequence[Path]) -> Iterator[Line]:
    """Yield every line that is not blank, malformed ones included, and one for an empty manifest.

    Raises:
        ManifestError: a manifest is no file.
    """
    for manifest in manifests:
        number = 0
        for number, text in raw_lines(manifest):
            yield _line(manifest, number, text)
        if not number:
            error = f"{manifest} holds no row; expected one JSON object a line"
            yield Line(manifest, 0, None, error, "", "empty_manifest")


def _line(manifest: Path, number: int, text: bytes) -> Line:
    location = f"{manifest} line {number}"
    try:
        sample = parse_row(text, location)
    except ManifestError as error:
        message = str(error).removeprefix(f"{location}: ")
        mistake = mistake_of(error)
        return Line(manifest, number, None, message, _id_of(text), error.reason, mistake)
    return Line(manifest, number, sample, "", sample.id)


def _id_of(text: bytes) -> str:
    """Return the id of a malformed line, or "" where it has none."""
    try:
        # As rows are read: json.loads fails on deep nesting, and accepts half surrogates.
        data = from_json(text)
    except ValueError:  # no JSON, or no UTF-8
        return ""
    identity = data.get("id") if isinstance(data, dict) else None
    return identity if isinstance(identity, str) else ""


def listable(identity: str) -> bool:
    """Return whether a quarantine list can name an id: before a tab, on one line."""
    return identity != "" and not any(character in identity for character in "\t\n\r")


def text_problems(sample: Sample) -> Iterator[Problem]:
    """Yield what is odd about a row's id and text."""
    if not listable(sample.id):
        yield Problem("unlisted_id", f"id {sample.id!r}")
    yield from _choice_problems(sample)
    last = len(sample.messages) - 1
    for number, message in enumerate(sample.messages):
        is_answer = message.role == "assistant"
        if (is_answer or number == last) and not (is_answer and message.text.strip()):
            yield Problem("empty_answer", f"turn {number} is the {message.role}'s")
    for number in range(len(sample.messages)):
        yield from _turn_problems(sample, number)


def _choice_problems(sample: Sample) -> Iterator[Problem]:
    """Yield the answers of a row that are none of its choices, by letter or by words."""
    if not sample.choices:
        return
    answers = [sample.answer or "", *(sample.answers or ())]
    outside = [text for text in answers if text.strip() and not _names_one(text, sample.choices)]
    if outside:
        seen = ", ".join(repr(text[:80]) for text in outside)
        choices = ", ".join(repr(choice[:80]) for choice in sample.choices)
        yield Problem("answer_outside_choices", f"{seen} is none of {choices}")


def _names_one(answer: str, choices: Sequence[str]) -> bool:
    """Return whether an answer begins with a choice's letter, or holds a choice's words."""
    said = _words(answer)
    letter = LETTER.match(answer)
    if letter is not None and ord(letter[1].lower()) - ord("a") < len(choices):
        return True
    for choice in choices:
        bare = _words(LETTER.sub("", choice)) or _words(choice)
        if f" {bare} " in f" {said} " or choice.strip().casefold() == answer.strip().casefold():
            return True
    return False


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def _turn_problems(sample: Sample, number: int) -> Iterator[Problem]:
    """Yield what is odd about one turn of a row."""
    message = sample.messages[number]
    turn = f"turn {number} ({message.role})"
    text_parts = [p for p in message.content if isinstance(p, WordPart)]
    media_count = len(message.content) - len(text_parts)
    if not media_count and not message.text.strip() and message.role != "assistant":
        yield Problem("empty_text", f"{turn} holds nothing")
    if len(message.text) > LONG_TEXT:
        yield Problem("long_text", f"{turn} has {len(message.text)} characters")
    placeholder = PLACEHOLDER.search(message.text)
    if placeholder:
        seen = f"{turn} holds {placeholder[0]!r} as text, beside {media_count} media parts"
        yield Problem("placeholder", seen)


class Ids:
    """Find ids that occur more than once, in one manifest or in several.

    Rows are counted in a first pass and looked up in a second. Of an id that occurs once only a
    hash is held, 8 bytes a row.
    """

    def __init__(self) -> None:
        self._hashes = array("q")
        self._repeated: set[int] = set()  # hashes that occur more than once
        # Of each repeated id, the first line in each manifest that has it.
        self._first: dict[str, dict[Path, int]] = {}

    def counting(self, rows: Iterable[Line]) -> Iterator[Line]:
        """Yield the same rows, and count their ids."""
        for line in rows:
            self._hashes.append(hash(line.id))
            yield line
        hashes, counts = np.unique(np.array(self._hashes, np.int64), return_counts=True)
        self._repeated = set(hashes[counts > 1].tolist())
        self._hashes = array("q")

    def occurs_again(self, identity: str) -> bool:
        """Return whether several of the counted rows have an id (or, rarely, its hash)."""
        return hash(identity) in self._repeated

    def problems(self, line: Line) -> Iterator[Problem]:
        """Yield a problem when an earlier row, of those that were counted, has the line's id.

        An earlier row of the same manifest is one problem, those of other manifests another.
        """
        if not line.id or not self.occurs_again(line.id):
            return
        first_lines = self._first.setdefault(line.id, {})
        others = [f"{path} line {n}" for path, n in first_lines.items() if path != line.manifest]
        number = first_lines.setdefault(line.manifest, line.number)
        if number != line.number:
            seen = f"id {line.id!r} occurs already in {line.manifest} line {number}"
            yield Problem("duplicate_id", seen)
        if others:
            seen = f"id {line.id!r} occurs already in {', '.join(others)}"
            yield Problem("id_in_two_manifests", seen)


class Origin(NamedTuple):
    """Locate a test row: its source, its manifest and line."""

    source: str
    location: str


@dataclass
class TestRows:
    """Hold what training rows must not share with test rows: ids, and long enough answers.

    Attributes:
        ids: origin of each id.
        captions: location of each answer, by :func:`caption_key`.
        malformed: test lines that are no rows; training rows cannot be compared with them.
    """

    __test__ = False  # pytest takes the name for a test's

    ids: dict[str, Origin] = field(default_factory=dict)
    captions: dict[bytes, str] = field(default_factory=dict)
    malformed: list[Line] = field(default_factory=list)

    def adding(self, rows: Iterable[Line]) -> Iterator[Line]:
        """Yield the same rows, and add them."""
        for line in rows:
            self._add(line)
            yield line

    def _add(self, line: Line) -> None:
        if line.sample is None:
            self.malformed.append(line)
            return
        self.ids.setdefault(line.sample.id, Origin(line.sample.source, line.location))
        key = caption_key(line.sample)
        if key is not None:
            self.captions.setdefault(key, line.location)

    def problems(self, sample: Sample) -> Iterator[Problem]:
        """Yield what a training row shares with test rows."""
        origin = self.ids.get(sample.id)
        if origin is not None:
            reason = "test_id" if origin.source == sample.source else "same_id_as_test"
            yield Problem(reason, f"id {sample.id!r}: {origin.location}")
        key = caption_key(sample)
        if key is not None and key in self.captions:
            answer = (sample.answer or "")[:80]
            yield Problem("test_caption", f"{answer!r}: {self.captions[key]}")


def caption_key(sample: Sample) -> bytes | None:
    """Return a hash of a row's answer that ignores case and punctuation.

    It is None for answers of a few words, which many rows share.
    """
    words = _words(sample.answer or "")
    if words.count(" ") + 1 < CAPTION_WORDS:
        return None
    return hashlib.blake2b(words.encode(), digest_size=16).digest()
