"""Read the authors' files for recipes: CSV, TSV, JSON, JSON lines; plain, gzipped or in a zip file.

All readers stream, and yield a :class:`Record` for each row: its fields and where it is.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
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
"""Names of the manifests, by the names that most authors give the splits in file names."""


class RecipeError(UserError):
    """A source that cannot be read: the message says what was seen, expected and what to do."""


class Record(dict[str, Any]):
    """The fields of one row of a file.

    Attributes:
        where: ``file:line`` of tables and JSON lines, ``file[index]`` or ``file["key"]`` of JSON.
        key: the key of the row when the file is one object of rows, else "".
        problem: of a table's row with more or fewer fields than columns, what is seen and expected,
            else "".
        surplus: the fields of such a row that exceed its columns.

    Raises:
        RecipeError: ``no_field`` on ``record["field"]``. The methods below raise it too, and
            ``field_type`` where the value has another type.
    """

    def __init__(self, fields: dict[str, Any], where: str, key: str = "") -> None:
        super().__init__(fields)
        self.where = where
        self.key = key
        self.problem = ""
        self.surplus: list[str] = []

    def __missing__(self, field: str) -> Any:
        fields = ", ".join(map(str, self)) or "none"
        raise RecipeError(
            f"{self.where}: no field {field!r}; the row has {fields}", reason="no_field"
        )

    def text(self, field: str) -> str:
        """Return a field as text without space around it; a number is written out, null is "".

        Raises:
            RecipeError: there is no such field, or it is a list or an object.
        """
        value = self[field]
        if isinstance(value, (list, dict)):
            raise self._wrong_type(field, f"a {type(value).__name__}", "text")
        return "" if value is None else str(value).strip()

    def number(self, field: str) -> float:
        """Return a field as a number.

        Raises:
            RecipeError: there is no such field, or it is no number.
        """
        value = self[field]
        try:
            return float(value)
        except (TypeError, ValueError):
            raise self._wrong_type(field, repr(value), "a number") from None

    def array(self, field: str) -> list[Any]:
        """Return a field that is a list.

        Raises:
            RecipeError: there is no such field, or it is no list.
        """
        value = self[field]
        if not isinstance(value, list):
            raise self._wrong_type(field, f"a {type(value).__name__}", "a list")
        return value

    def _wrong_type(self, field: str, seen: str, expected: str) -> RecipeError:
        message = f"{self.where}: field {field!r} is {seen}; expected {expected}"
        return RecipeError(message, reason="field_type")


UNREADABLE = (
    UnicodeDecodeError,
    csv.Error,
    EOFError,
    zlib.error,
    gzip.BadGzipFile,
    zipfile.BadZipFile,
)
"""Errors of a file that is cut short, damaged, or in another encoding."""


@contextmanager
def open_text(path: Path, encoding: str = "utf-8-sig") -> Iterator[IO[str]]:
    """Open a text file; ``x.gz`` and ``a.zip/inner.json`` are unpacked while they are read.

    UTF-8 may begin with a byte order mark.

    Raises:
        RecipeError: ``no_file``, ``no_member`` of the zip file, ``broken_zip``; or ``unreadable``,
            where what is read inside the ``with`` cannot be unpacked, is in another encoding, or is
            no table.
    """
    try:
        with _opened(path, encoding) as file:
            yield file
    except UNREADABLE as error:
        raise RecipeError(
            f"{path} cannot be read: {error}; is the file whole, and in {encoding}?",
            reason="unreadable",
        ) from error


def _opened(path: Path, encoding: str) -> IO[str]:
    archive = next((p for p in path.parents if p.suffix == ".zip" and p.is_file()), None)
    if archive is not None:
        return _member(archive, path.relative_to(archive).as_posix(), encoding)
    if not path.is_file():
        raise RecipeError(f"{path} is not there; expected a file of the data set", reason="no_file")
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding=encoding, newline="")
    return path.open(encoding=encoding, newline="")


def _member(archive: Path, name: str, encoding: str) -> IO[str]:
    try:
        return io.TextIOWrapper(zipfile.ZipFile(archive).open(name), encoding=encoding, newline="")
    except KeyError:
        raise RecipeError(f"{archive} has no member {name}", reason="no_member") from None
    except zipfile.BadZipFile as error:
        raise RecipeError(
            f"{archive} is no whole zip file ({error}); get it again", reason="broken_zip"
        ) from error


def read_csv(
    path: Path,
    columns: Iterable[str],
    delimiter: str = ",",
    header: bool = True,
    comment: str | None = None,
    encoding: str = "utf-8-sig",
) -> Iterator[Record]:
    """Yield the rows of a table.

    A row with more or fewer fields than columns has its ``problem`` set, and ``rows_of`` drops it.

    Args:
        path: see :func:`open_text`.
        columns: with a header, those that must be there (others are kept); without one, the names
            of all.
        delimiter: separates the fields; a tab for TSV, where quotes are text.
        header: whether the first row names the columns.
        comment: lines that begin with this are passed over.
        encoding: of the file.

    Raises:
        RecipeError: see :func:`open_text`; ``no_column``.
    """
    with open_text(path, encoding) as file:
        lines = _Lines(file, comment)
        quoting: Literal[0, 3] = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
        table = csv.reader(lines, delimiter=delimiter, quoting=quoting)
        names = list(columns)
        if header:
            names = _header_names(path, next(table, []), names)
        for row in table:
            record = Record(dict(zip(names, row, strict=False)), f"{path.name}:{lines.number}")
            record.surplus = row[len(names) :]
            if len(row) != len(names):
                expected = f"{len(names)} are expected ({', '.join(names)})"
                record.problem = f"{len(row)} fields where {expected}"
            if row:
                yield record


def _header_names(path: Path, header: list[str], expected: list[str]) -> list[str]:
    names = [name.strip() for name in header]
    absent = [name for name in expected if name not in names]
    if absent:
        raise RecipeError(
            f"{path} has no column {', '.join(absent)}; expected {', '.join(expected)}, "
            f"found {', '.join(names)}",
            reason="no_column",
        )
    return names


class _Lines:
    """The lines of a file without its comments; ``number`` is the line last given, from 1."""

    def __init__(self, file: IO[str], comment: str | None) -> None:
        self.file = file
        self.comment = comment
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        for line in self.file:
            self.number += 1
            if self.comment is None or not line.startswith(self.comment):
                yield line


def read_jsonl(path: Path) -> Iterator[Record]:
    """Yield the objects of a file of JSON lines; blank lines are passed over.

    Raises:
        RecipeError: see :func:`open_text`; ``no_json``; ``no_object`` where a line is other JSON.
    """
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise RecipeError(
                    f"{path} line {number}: no JSON ({error}); is the file whole?",
                    reason="no_json",
                ) from error
            where = f"{path.name}:{number}"
            if not isinstance(value, dict):
                raise RecipeError(
                    f"{path.parent / where}: a {type(value).__name__}; expected an object",
                    reason="no_object",
                )
            yield Record(value, where)


def read_json(path: Path, field: str | None = None) -> Iterator[Record]:
    """Yield the rows of a JSON file.

    It is a list of objects, or one object whose values are the rows (see ``Record.key``). Rows that
    are no objects are given as ``{"value": row}``. The file is never in memory as a whole.

    Args:
        path: see :func:`open_text`.
        field: the field that holds the rows: ``{"version": 1, "data": [...]}``.

    Raises:
        RecipeError: see :func:`open_text`; ``no_field``; ``no_json`` where there is no list or
            object, or the file is no (whole) JSON.
    """
    with open_text(path) as file:
        stream = _JsonStream(file, path)
        if field is not None:
            stream.enter(field)
        opening = stream.take("[{")
        index = 0
        while (key := stream.next_key(opening, first=index == 0)) is not None:
            place = str(index) if opening == "[" else json.dumps(key)
            value = stream.value()
            fields = value if isinstance(value, dict) else {"value": value}
            yield Record(fields, f"{path.name}[{place}]", key)
            index += 1


class _JsonStream:
    """A cursor in a JSON text that is read in chunks."""

    def __init__(self, file: IO[str], path: Path) -> None:
        self.file = file
        self.path = path
        self.buffer = ""
        self.at = 0  # the next character of the buffer
        self.ended = False  # whether the buffer reaches the end of the file
        self.decoder = json.JSONDecoder()

    def more(self) -> None:
        """Drop from the buffer what was read, and append a chunk."""
        # As much as is left: the buffer doubles, so that the time for a huge value stays linear.
        chunk = self.file.read(max(CHUNK, len(self.buffer) - self.at))
        self.buffer = self.buffer[self.at :] + chunk
        self.at = 0
        self.ended = not chunk

    def peek(self) -> str:
        """Return the next character that is no space, "" at the end."""
        while True:
            while self.at < len(self.buffer) and self.buffer[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.buffer) or self.ended:
                return self.buffer[self.at : self.at + 1]
            self.more()

    def take(self, expected: str) -> str:
        """Step over the next character, which has to be one of these, and return it."""
        character = self.peek()
        if not character or character not in expected:
            seen = character or "the end"
            raise self.error(f"found {seen!r} where one of {expected!r} is expected")
        self.at += 1
        return character

    def value(self) -> Any:
        """Read the value at the cursor."""
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
        """Step to the next item; return an object's key, "" in a list, None at the end."""
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
        names = ", ".join(seen) or "none"
        raise RecipeError(f"{self.path}: no field {field!r}; it has {names}", reason="no_field")

    def error(self, problem: str) -> RecipeError:
        """Return an error that names the file."""
        return RecipeError(f"{self.path}: {problem}; is the file whole?", reason="no_json")
