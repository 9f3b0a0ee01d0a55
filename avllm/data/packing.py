"""Several questions about one clip in one sequence: one copy of the media in front, the questions blind to each other.

Part 0 is the shared beginning; part k is what follows of row k. A token sees part 0 and what stands before it in its
own part (see ``Batch.segments``), and positions restart behind part 0, so that loss and gradients are those of the rows
one by one, while the media passes through the LLM once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from avllm.data.collate import Row


def pack_rows(rows: Sequence[Row], max_length: int) -> list[Row]:
    """Pack rows with the same clips into as few sequences as ``max_length`` allows, in order.

    Args:
        rows: of one and the same media, each within ``max_length`` tokens.
        max_length: of a packed row.

    Returns:
        packed rows; the rows themselves where their common beginning does not hold all the media (a question that
        stands before its clip).
    """
    packed: list[Row] = []
    shared = shared_length(rows)
    if shared == 0:
        return list(rows)
    pending: list[Row] = []
    length = shared
    for row in rows:
        extra = len(row.input_ids) - shared
        if pending and length + extra > max_length:
            packed.append(_join(pending, shared))
            pending, length = [], shared
        pending.append(row)
        length += extra
    packed.append(_join(pending, shared))
    return packed


def shared_length(rows: Sequence[Row]) -> int:
    """Tokens that the rows begin with in common and that can stand once; 0 when the media would not all be among them.

    It ends one token before the first trained-on token at the latest: each segment has to bring the token that its
    first target is predicted from.
    """
    length = min(len(row.input_ids) for row in rows)
    first = rows[0].input_ids[:length]
    for row in rows:
        differs = (row.input_ids[:length] != first[:length]).nonzero()
        length = int(differs[0]) if len(differs) else length
        targets = (row.labels >= 0).nonzero()
        length = min(length, int(targets[0]) - 1 if len(targets) else len(row.input_ids))
    media_end = max(media_end_of(row) for row in rows)
    return length if length >= media_end else 0


def media_end_of(row: Row) -> int:
    """The place behind the last media token of a row."""
    places = row.is_media.nonzero()
    return int(places[-1]) + 1 if len(places) else 0


def _join(rows: Sequence[Row], shared: int) -> Row:
    if len(rows) == 1:
        return rows[0]
    tails = [len(row.input_ids) - shared for row in rows]
    parts = [torch.zeros(shared, dtype=torch.long)]
    positions = [torch.arange(shared)]
    for number, tail in enumerate(tails, start=1):
        parts.append(torch.full((tail,), number))
        positions.append(torch.arange(shared, shared + tail))
    return replace(
        rows[0],
        input_ids=torch.cat([rows[0].input_ids[:shared], *(r.input_ids[shared:] for r in rows)]),
        labels=torch.cat([rows[0].labels[:shared], *(r.labels[shared:] for r in rows)]),
        is_media=torch.cat([rows[0].is_media[:shared], *(r.is_media[shared:] for r in rows)]),
        segments=torch.stack([torch.zeros(shared + sum(tails), dtype=torch.long), torch.cat(parts)], dim=1),  # (L, 2)
        position_ids=torch.cat(positions),
        targets=[text for r in rows for text in r.targets],
    )
