"""Several rows in one sequence, blind to each other: loss and gradients are those of the rows one by one.

``pack_rows`` (questions about one clip): one copy of the media in front, the questions behind it. Part 0 is the shared
beginning; part k is what follows of row k. A token sees part 0 and what stands before it in its own part (see
``Batch.segments``), and positions restart behind part 0; the media passes through the LLM once.

``fill_sequences`` (any rows): one behind the other, each a group of its own in which positions start at 0. Nothing is
computed twice or less by it; what it saves is padding.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from avllm.data.collate import IGNORE
from avllm.data.soft import join

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
        length = length if row.soft is None else min(length, row.soft.first)
    media_end = max(media_end_of(row) for row in rows)
    return length if length >= media_end else 0


def media_end_of(row: Row) -> int:
    """The place behind the last media token of a row."""
    places = row.is_media.nonzero()
    return max([int(places[-1]) + 1 if len(places) else 0, *row.clip_places])


def _join(rows: Sequence[Row], shared: int) -> Row:
    if len(rows) == 1:
        return rows[0]
    tails = [len(row.input_ids) - shared for row in rows]
    parts = [torch.zeros(shared, dtype=torch.long)]
    positions = [torch.arange(shared)]
    softs = []
    for number, tail in enumerate(tails, start=1):
        soft = rows[number - 1].soft
        softs.append(None if soft is None else soft.moved(sum(tails[: number - 1])))
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
        soft=join(softs),
    )


def fill_sequences(rows: Sequence[Row], max_length: int) -> list[Row]:
    """Put rows one behind the other into few sequences of nearly equal length.

    Rows stay whole, media runs with them. The result is a function of the rows' lengths and order alone.

    Args:
        rows: of any media, packed ones among them; at least one.
        max_length: of a sequence, or the longest row where that is longer.
    """
    return [_chain([rows[i] for i in places]) for places in level_bins([len(r.input_ids) for r in rows], max_length)]


def level_bins(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Places of ``lengths`` in bins: as few bins as first fit decreasing needs, levelled.

    A batch is padded to its longest sequence, so the bins are filled again with the smallest capacity at which their
    number stays the same (MULTIFIT; Coffman, Garey and Johnson 1978, doi:10.1137/0207001).
    """
    capacity = max(capacity, *lengths)
    count = len(first_fit(lengths, capacity))
    least = max(-(-sum(lengths) // count), *lengths)
    more = bisect_left(range(least, capacity), True, key=lambda c: len(first_fit(lengths, c)) <= count)
    return first_fit(lengths, least + more)


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """First fit decreasing: the longest first, each into the first bin with room. Bins and what is in them keep the
    order of ``lengths``.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = next((n for n, free in enumerate(room) if free >= lengths[place]), len(bins))
        if at == len(bins):
            bins.append([])
            room.append(capacity)
        bins[at].append(place)
        room[at] -= lengths[place]
    return sorted(sorted(places) for places in bins)


def _chain(rows: Sequence[Row]) -> Row:
    """Rows one behind the other, the group of each its number in the sequence."""
    if len(rows) == 1:
        return rows[0]
    segments, positions, softs = [], [], []
    before = 0
    for group, row in enumerate(rows):
        length = len(row.input_ids)
        softs.append(None if row.soft is None else row.soft.moved(before))
        before += length
        part = torch.zeros(length, dtype=torch.long) if row.segments is None else row.segments[:, 1]
        segments.append(torch.stack([torch.full((length,), group), part], dim=1))  # (L, 2)
        positions.append(torch.arange(length) if row.position_ids is None else row.position_ids)
    # the first token of a sequence is nobody's next one, and so it has to be behind another row
    labels = [torch.cat([r.labels.new_full((1,), IGNORE), r.labels[1:]]) for r in rows]
    sources, kinds = {r.source for r in rows}, {r.kind for r in rows}
    return replace(
        rows[0],
        id=", ".join(r.id for r in rows),
        source=sources.pop() if len(sources) == 1 else "several",
        kind=kinds.pop() if len(kinds) == 1 else None,
        input_ids=torch.cat([r.input_ids for r in rows]),
        labels=torch.cat(labels),
        is_media=torch.cat([r.is_media for r in rows]),
        clips=[clip for r in rows for clip in r.clips],
        clip_places=_chained_places(rows),
        segments=torch.cat(segments),
        position_ids=torch.cat(positions),
        targets=[text for r in rows for text in r.targets],
        soft=join(softs),
    )


def _chained_places(rows: Sequence[Row]) -> list[int]:
    places: list[int] = []
    length = 0
    for row in rows:
        places += [length + place for place in row.clip_places]
        length += len(row.input_ids)
    return places
