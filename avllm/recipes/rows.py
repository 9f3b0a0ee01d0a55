"""What a recipe yields: rows and drops; and how records of the authors' files become them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from avllm.data.schema import RowError
from avllm.recipes.readers import RecipeError, Record


@dataclass(frozen=True)
class Row:
    """A sample in the form of ``avllm.data.schema`` (media paths absolute or relative to the source) and its split."""

    sample: dict[str, Any]
    split: str = "train"


@dataclass(frozen=True)
class Drop:
    """A row that is left out: ``reason`` is one word to count by, ``where`` is file:line or an id.

    With the reason ``missing_media`` or ``empty_media``, ``detail`` is the path of the file, which is named in
    ``missing.txt``.
    """

    reason: str
    where: str
    detail: str = ""


def rows_of(
    records: Iterable[Record], build: Callable[[Record], Row | Drop | Iterable[Row | Drop]]
) -> Iterator[Row | Drop]:
    """What ``build`` makes of each record: a row, a drop, or several.

    A record with which it raises an error is a drop: ``malformed_row`` of a ``RecipeError`` (a field is absent or of
    another type), the reason of a ``RowError``. So is a row of a table with more or fewer fields than columns.
    """
    for record in records:
        if record.problem:
            yield Drop("malformed_row", record.where, record.problem)
            continue
        try:
            made = build(record)
            found = [made] if isinstance(made, (Row, Drop)) else list(made)
        except RowError as error:
            found = [Drop(error.reason, record.where, error.detail)]
        except RecipeError as error:
            found = [Drop("malformed_row", record.where, str(error))]
        yield from found


def drops_of(records: Iterable[Record], read: Callable[[Record], object]) -> Iterator[Row | Drop]:
    """Read records that rows are made with later (lengths, licences); gives a drop for each that cannot be read."""

    def build(record: Record) -> list[Row | Drop]:
        read(record)
        return []

    yield from rows_of(records, build)
