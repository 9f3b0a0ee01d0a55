"""Order and draw rows by what they hold, never by their places in a file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from avllm.data.schema import Sample
from avllm.errors import UserError


def sort_rows(rows: Sequence[Sample]) -> list[Sample]:
    """Return the rows by their ids: what is computed of them does not depend on their file's order.

    Batches and sums of floating-point numbers depend on order in their last digits.
    """
    return sorted(rows, key=lambda row: (row.id, row.model_dump_json()))


def draw_rows(rows: Sequence[Sample], limit: int | None, seed: int) -> list[Sample]:
    """Draw ``limit`` rows, of each kind its share, and return them by their ids.

    The rows of a kind are put into an order that follows from seed and ids. The r-th of n rows
    gets the place (r + 1/2) / n, and the rows with the lowest places are taken; so a smaller
    limit takes a part of what a larger one takes.

    Args:
        rows: of a manifest, in any order.
        limit: None takes all.
        seed: of the draw.

    Raises:
        UserError: a limit below 1.
    """
    if limit is None or limit >= len(rows):
        return sort_rows(rows)
    if limit < 1:
        raise UserError(f"limit is {limit}; expected at least 1 row")
    by_kind: dict[str, list[Sample]] = {}
    for row in sort_rows(rows):
        by_kind.setdefault(row.kind or "", []).append(row)
    placed: list[tuple[float, bytes, Sample]] = []
    for of_kind in by_kind.values():
        drawn = sorted(of_kind, key=lambda row: draw_key(row.id, seed))
        for number, row in enumerate(drawn):
            placed.append(((number + 0.5) / len(drawn), draw_key(row.id, seed), row))
    placed.sort(key=lambda entry: entry[:2])
    return sort_rows([row for _, _, row in placed[:limit]])


def draw_key(name: str, seed: int) -> bytes:
    """Return a random-looking key that follows from a row's id and the seed."""
    return hashlib.blake2b(f"{seed} {name}".encode("utf-8", "replace"), digest_size=8).digest()
