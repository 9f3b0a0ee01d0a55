"""Readers of the authors' files for recipes: CSV, TSV, JSON and JSON lines, plain, gzipped or inside a zip file.

All of them stream, and yield a :class:`Record` for each row: its fields and where it stands.
"""

from __future__ import annotations

import csv
import functools
import gzip
import io
import json
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

from avllm.errors import UserError

CHUNK = 1 << 20
"""Characters of a JSON file that are read at a time."""
SPLITS = {"train": "train", "val": "validation", "test": "test"}
"""What most authors call their splits in file names, and what the manifests are called."""
MISSING, EMPTY = "missing_media", "empty_media"
"""Reasons to drop a row: a media file is not there, or of zero bytes (what a download that failed leaves)."""


class RecipeError(UserError):
    """A source that cannot be read: the message says what was seen, what was expected and what to do."""


class Record(dict[str, Any]):
    """The fields of one row of a file.

    Attributes:
        where: ``file:line`` of a table or of JSON lines, ``file[index]`` or ``file["key"]`` of JSON.
        key: the key of the row when the file is one object of rows, else "".
        problem: of a table's row with more or fewer fields than columns, what is seen and expected, else "".
        surplus: what such a row holds behind its last column.

    Raises:
        RecipeError: on ``record["field"]`` when the row has no such field.
    """

    def __init__(self, fields: dict[str, Any], where: str, key: str = "") -> None:
        super().__init__(fields)
        self.where, self.key = where, key
        self.problem = ""
        self.surplus: list[str] = []

    def __missing__(self, field: str) -> Any:
        raise RecipeError(f"{self.where}: no field {field!r}; the row has {', '.join(map(str, self)) or 'none'}")

    def text(self, field: str) -> str:
        """A field as text without space around it; a number is written out, null is "".

        Raises:
            RecipeError: there is no such field, or it is a list or an object.
        """
        value = self[field]
        if isinstance(value, (list, dict)):
            raise RecipeError(f"{self.where}: field {field!r} is a {type(value).__name__}; expected text")
        return "" if value is None else str(value).strip()

    def number(self, field: str) -> float:
        """A field as a number.

        Raises:
            RecipeError: there is no such field, or it is no number.
        """
        value = self[field]
        try:
            return float(value)
        except (TypeError, ValueError):
            raise RecipeError(f"{self.where}: field {field!r} is {value!r}; expected a number") from None

    def array(self, field: str) -> list[Any]:
        """A field that is a list.

        Raises:
            RecipeError: there is no such field, or it is no list.
        """
        value = self[field]
        if not isinstance(value, list):
            raise RecipeError(f"{self.where}: field {field!r} is a {type(value).__name__}; expected a list")
        return value


@contextmanager
def open_text(path: Path, encoding: str = "utf-8-sig") -> Iterator[IO[str]]:
    """A text file; ``x.gz`` and ``a.zip/inner.json`` are unpacked as read. UTF-8 may begin with a byte order mark.

    Raises:
        RecipeError: there is no such file, or no such member of the zip file; or what is read of it inside the
            ``with`` cannot be unpacked, is in another encoding, or no table.
    """
    try:
        with _opened(path, encoding) as file:
            yield file
    except (UnicodeDecodeError, csv.Error, EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile) as error:
        raise RecipeError(f"{path} cannot be read: {error}; is the file whole, and in {encoding}?") from error


def _opened(path: Path, encoding: str) -> IO[str]:
    archive = next((p for p in path.parents if p.suffix == ".zip" and p.is_file()), None)
    if archive is not None:
        return _member(archive, path.relative_to(archive).as_posix(), encoding)
    if not path.is_file():
        raise RecipeError(f"{path} is not there; expected a file of the data set")
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding=encoding, newline="")
    return path.open(encoding=encoding, newline="")


def _member(archive: Path, name: str, encoding: str) -> IO[str]:
    try:
        return io.TextIOWrapper(zipfile.ZipFile(archive).open(name), encoding=encoding, newline="")
    except KeyError:
        raise RecipeError(f"{archive} has no member {name}") from None
    except zipfile.BadZipFile as error:
        raise RecipeError(f"{archive} is no whole zip file ({error}); get it again") from error


def read_csv(
    path: Path,
    columns: Iterable[str],
    delimiter: str = ",",
    header: bool = True,
    comment: str | None = None,
    encoding: str = "utf-8-sig",
) -> Iterator[Record]:
    """The rows of a table; one with more or fewer fields than columns has its ``problem`` set (``rows_of`` drops it).

    Args:
        path: see :func:`open_text`.
        columns: with a header, those that must be there (others are kept); without one, the names of all.
        delimiter: what stands between the fields; a tab for TSV, where quotes are text.
        header: whether the first row names the columns.
        comment: lines that begin with this are passed over.

    Raises:
        RecipeError: no file, or a column is absent.
    """
    with open_text(path, encoding) as file:
        lines = _Lines(file, comment)
        quoting: Literal[0, 3] = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
        table = csv.reader(lines, delimiter=delimiter, quoting=quoting)
        names = _columns(path, next(table, []) if header else None, list(columns))
        for row in table:
            record = Record(dict(zip(names, row, strict=False)), f"{path.name}:{lines.number}")
            record.surplus = row[len(names) :]
            if len(row) != len(names):
                record.problem = f"{len(row)} fields where {len(names)} are expected ({', '.join(names)})"
            if row:
                yield record


def _columns(path: Path, header: list[str] | None, expected: list[str]) -> list[str]:
    names = expected if header is None else [name.strip() for name in header]
    absent = [name for name in expected if name not in names]
    if absent:
        raise RecipeError(
            f"{path} has no column {', '.join(absent)}; expected {', '.join(expected)}, found {', '.join(names)}"
        )
    return names


class _Lines:
    """The lines of a file without its comments; ``number`` is the line last given, from 1."""

    def __init__(self, file: IO[str], comment: str | None) -> None:
        self.file, self.comment, self.number = file, comment, 0

    def __iter__(self) -> Iterator[str]:
        for line in self.file:
            self.number += 1
            if self.comment is None or not line.startswith(self.comment):
                yield line


def read_jsonl(path: Path) -> Iterator[Record]:
    """One JSON object a line; blank lines are passed over.

    Raises:
        RecipeError: no file, or a line that is no JSON object.
    """
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise RecipeError(f"{path} line {number}: no JSON ({error}); is the file whole?") from error
            yield _record(value, f"{path.name}:{number}", path)


def read_json(path: Path, field: str | None = None) -> Iterator[Record]:
    """The rows of a JSON file that is a list of objects, or one object whose values are the rows (see ``Record.key``).

    Rows that are no objects are given as ``{"value": row}``. The file is never in memory as a whole.

    Args:
        path: see :func:`open_text`.
        field: the rows stand in this field of the file's object: ``{"version": 1, "data": [...]}``.

    Raises:
        RecipeError: no file, no such field, no list or object there, or the file is no (whole) JSON.
    """
    with open_text(path) as file:
        stream = _JsonStream(file, path)
        if field is not None:
            stream.enter(field)
        opening = stream.take("[{")
        index = 0
        while (key := stream.next_key(opening, first=index == 0)) is not None:
            where = f"{path.name}[{index}]" if opening == "[" else f"{path.name}[{json.dumps(key)}]"
            value = stream.value()
            yield Record(value if isinstance(value, dict) else {"value": value}, where, key)
            index += 1


def _record(value: Any, where: str, path: Path) -> Record:
    if not isinstance(value, dict):
        raise RecipeError(f"{path.parent / where}: a {type(value).__name__}; expected an object")
    return Record(value, where)


def files_by_stem(folder: Path, source: Path, suffixes: Iterable[str]) -> dict[str, str]:
    """Name without suffix -> path relative to ``source`` of all files below a folder; of two, the first by name.

    For media whose folders differ from copy to copy, and whose names are ids.
    """
    wanted = tuple(suffixes)
    found: dict[str, str] = {}
    for root, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in wanted:
                found.setdefault(stem, Path(os.path.relpath(os.path.join(root, name), source)).as_posix())
    return found


@functools.lru_cache(maxsize=1 << 16)
def lacking(path: str) -> str | None:
    """Whether a media file is ``MISSING`` or ``EMPTY``; None where there is something in it. Remembered."""
    if not os.path.isfile(path):
        return MISSING
    return None if os.path.getsize(path) else EMPTY


def first_file(source: Path, names: Iterable[str]) -> str:
    """The first of these paths (relative to ``source``) that is there, else the first: for files of several namings."""
    names = list(names)
    return next((name for name in names if lacking(str(source / name)) != MISSING), names[0])


class _JsonStream:
    """A cursor in a JSON text that is read in chunks."""

    def __init__(self, file: IO[str], path: Path) -> None:
        self.file, self.path, self.buffer, self.at, self.ended = file, path, "", 0, False
        self.decoder = json.JSONDecoder()

    def more(self) -> None:
        """Drop what was read and append a chunk."""
        chunk = self.file.read(max(CHUNK, len(self.buffer) - self.at))  # doubles, so that a huge value stays linear
        self.buffer, self.at, self.ended = self.buffer[self.at :] + chunk, 0, not chunk

    def peek(self) -> str:
        """The next character that is no space, "" at the end."""
        while True:
            while self.at < len(self.buffer) and self.buffer[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.buffer) or self.ended:
                return self.buffer[self.at : self.at + 1]
            self.more()

    def take(self, expected: str) -> str:
        """The next character, which has to be one of these."""
        found = self.peek()
        if not found or found not in expected:
            raise self.error(f"found {found or 'the end'!r} where one of {expected!r} is expected")
        self.at += 1
        return found

    def value(self) -> Any:
        """The value that begins here."""
        self.peek()
        while True:
            problem: json.JSONDecodeError | None = None
            try:
                value, end = self.decoder.raw_decode(self.buffer, self.at)
                # A number at the end of the buffer may go on in the next chunk.
                if end < len(self.buffer) or self.ended:
                    self.at = end
                    return value
            except json.JSONDecodeError as error:
                problem = error
            if self.ended and problem is not None:
                raise self.error(str(problem))
            self.more()

    def next_key(self, opening: str, first: bool) -> str | None:
        """Step to the next item of a list ("" for each) or object (its key); None at the end of it."""
        closing = "]" if opening == "[" else "}"
        if self.peek() == closing:
            self.at += 1
            return None
        if not first:
            self.take(",")
        if opening == "[":
            return ""
        key = self.value()
        self.take(":")
        return str(key)

    def enter(self, field: str) -> None:
        """Step to the value of a field of the file's object."""
        self.take("{")
        seen: list[str] = []
        while (key := self.next_key("{", first=not seen)) is not None:
            if key == field:
                return
            seen.append(key)
            self.value()
        raise self.error(f"no field {field!r}; it has {', '.join(seen) or 'none'}", hint="")

    def error(self, what: str, hint: str = "; is the file whole?") -> RecipeError:
        """An error that names the file."""
        return RecipeError(f"{self.path}: {what}{hint}")
