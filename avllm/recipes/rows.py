"""Turn records of the authors' files into rows and drops, which is what a recipe yields."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from avllm.data.schema import RowError
from avllm.recipes.readers import RecipeError, Record


@dataclass(frozen=True)
class RecipeRow:
    """A row for the manifest of a split.

    Attributes:
        sample: in the form of ``avllm.data.schema``; media paths are absolute or relative to the
            source.
        split: name of the manifest.
    """

    sample: dict[str, Any]
    split: str = "train"


@dataclass(frozen=True)
class Drop:
    """A row that is left out.

    Attributes:
        reason: one word to count by.
        where: file:line or an id.
        detail: what was seen; with the reason ``missing_media`` or ``empty_media`` the path of the
            file, which ``missing.txt`` lists.
    """

    reason: str
    where: str
    detail: str = ""


Build = Callable[[Record], RecipeRow | Drop | Iterable[RecipeRow | Drop]]
"""Makes one row or drop, or several, of a record."""


def rows_of(records: Iterable[Record], build: Build) -> Iterator[RecipeRow | Drop]:
    """Yield the rows and drops that ``build`` makes of each record.

    A record with which it raises an error is a drop: ``malformed_row`` of a ``RecipeError`` (a
    field is absent or of another type), the reason of a ``RowError``. A row of a table with more or
    fewer fields than columns is a drop, too.
    """
    for record in records:
        if record.problem:
            yield Drop("malformed_row", record.where, record.problem)
        else:
            yield from _built(record, build)


def _built(record: Record, build: Build) -> list[RecipeRow | Drop]:
    """Return all that is made of one record, or one drop: a record is never half there."""
    try:
        items = build(record)
        if isinstance(items, (RecipeRow, Drop)):
            return [items]
        return list(items)
    except RowError as error:
        return [Drop(error.reason, record.where, error.detail)]
    except RecipeError as error:
        return [Drop("malformed_row", record.where, str(error))]


def drops_of(
    records: Iterable[Record], read: Callable[[Record], object]
) -> Iterator[RecipeRow | Drop]:
    """Read records that rows are made with later, and yield a drop for each that cannot be read.

    Such records hold lengths or licences, for example.
    """

    def build(record: Record) -> list[RecipeRow | Drop]:
        read(record)
        return []

    yield from rows_of(records, build)
