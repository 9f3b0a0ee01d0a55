"""Pack several rows into one sequence; loss and gradients are those of the rows one by one.

``share_media`` (questions about one clip) puts one copy of the media in front and the questions
after it, so that the media passes through the LLM once. Segment 0 is the shared beginning; segment
k is the rest of row k. A token sees segment 0 and the earlier tokens of the segment in which it
lies (see ``Batch.segments``), and positions restart after segment 0.

``fill_sequences`` (any rows) puts rows end to end, each a group by itself with positions from 0. It
saves padding and nothing else.

Parts (:class:`~avllm.data.row.Part`) move with their tokens and clips, so that an objective gets
the same questions and answers from a packed row as from single ones.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from avllm.data.row import IGNORE, Part, Row
from avllm.data.soft import join


def share_media(rows: Sequence[Row], max_length: int) -> list[Row]:
    """Pack rows with the same clips into as few sequences as ``max_length`` allows, in order.

    Args:
        rows: about the same media, each within ``max_length`` tokens.
        max_length: of a packed row.

    Returns:
        packed rows; the rows themselves where their common beginning does not hold all the media (a
        question that comes before its clip), or where one of them is packed already.
    """
    if any(row.segments is not None for row in rows):  # segments have one shared beginning, not two
        return list(rows)
    shared = shared_length(rows)
    if shared == 0:
        return list(rows)
    packed: list[Row] = []
    pending: list[Row] = []
    length = shared
    for row in rows:
        extra = len(row.input_ids) - shared
        if pending and length + extra > max_length:
            packed.append(share_beginning(pending, shared))
            pending = []
            length = shared
        pending.append(row)
        length += extra
    packed.append(share_beginning(pending, shared))
    return packed


def shared_length(rows: Sequence[Row]) -> int:
    """Count the tokens that the rows begin with in common; 0 when they lack some of the media.

    The common part ends one token before the first token of any answer at the latest: each segment
    has to bring the token that its first target is predicted from.
    """
    length = min(len(row.input_ids) for row in rows)
    first = rows[0].input_ids[:length]
    for row in rows:
        differing = (row.input_ids[:length] != first[:length]).nonzero()
        if len(differing):
            length = int(differing[0])
        if row.first_trained < len(row.input_ids):
            length = min(length, row.first_trained - 1)
        if row.soft is not None:
            length = min(length, row.soft.first)
    media_end = max(row.media_end for row in rows)
    return length if length >= media_end else 0


def share_beginning(rows: Sequence[Row], shared: int) -> Row:
    """Put rows after one copy of their first ``shared`` tokens, each in a blind segment."""
    if len(rows) == 1:
        return rows[0]
    first = rows[0]
    segments = [torch.zeros(shared, dtype=torch.long)]
    positions = [torch.arange(shared)]
    parts: list[Part] = []
    softs = []
    length = shared
    for number, row in enumerate(rows, start=1):
        rest = len(row.input_ids) - shared
        segments.append(torch.full((rest,), number))
        positions.append(torch.arange(shared, shared + rest))
        parts += [part.moved(length - shared, after=shared) for part in row.parts]
        softs.append(row.soft.moved(length - shared) if row.soft is not None else None)
        length += rest
    segment = torch.cat(segments)  # (L,)
    return replace(
        first,
        input_ids=_after_beginning([row.input_ids for row in rows], shared),
        labels=_after_beginning([row.labels for row in rows], shared),
        is_media=_after_beginning([row.is_media for row in rows], shared),
        parts=tuple(parts),
        segments=torch.stack([torch.zeros_like(segment), segment], dim=1),  # (L, 2)
        position_ids=torch.cat(positions),
        soft=join(softs),
    )


def _after_beginning(items: Sequence[Tensor], shared: int) -> Tensor:
    """Return the beginning once, then the rest of each item, ``(L, ...)``."""
    return torch.cat([items[0][:shared], *(item[shared:] for item in items)])


def fill_sequences(rows: Sequence[Row], max_length: int) -> list[Row]:
    """Put rows end to end into few sequences of nearly equal length.

    Rows stay whole. The result follows from the rows' lengths, variants and order alone.

    Args:
        rows: of any media, packed ones among them; at least one.
        max_length: of a sequence, or the longest row where that is longer.
    """
    sequences = []
    for variant in dict.fromkeys(row.variant for row in rows):
        alike = [row for row in rows if row.variant == variant]
        bins = level_bins([len(row.input_ids) for row in alike], max_length)
        for places in bins:
            sequences.append(end_to_end([alike[place] for place in places]))  # noqa: PERF401
    return sequences


def level_bins(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return places of ``lengths`` in bins: as few bins as first fit decreasing needs, levelled.

    A batch is padded to its longest sequence, so the bins are filled a second time with the
    smallest capacity at which their number stays the same (MULTIFIT; Coffman, Garey and Johnson
    1978, doi:10.1137/0207001).
    """
    capacity = max(capacity, *lengths)
    count = len(first_fit(lengths, capacity))
    least = max(-(-sum(lengths) // count), *lengths)

    def is_enough(tried: int) -> bool:
        return len(first_fit(lengths, tried)) <= count

    # False for capacities that are too small, then True: search for the first True.
    smallest = least + bisect_left(range(least, capacity), True, key=is_enough)
    return first_fit(lengths, smallest)


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return places of ``lengths`` in bins: the longest first, each into the first with room.

    Bins, and the places in them, keep the order of ``lengths``.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        with_room = (number for number, free in enumerate(room) if free >= lengths[place])
        number = next(with_room, len(bins))
        if number == len(bins):
            bins.append([])
            room.append(capacity)
        bins[number].append(place)
        room[number] -= lengths[place]
    return sorted(sorted(places) for places in bins)


def end_to_end(rows: Sequence[Row]) -> Row:
    """Put rows one after the other; each is a group, numbered by its place in the sequence."""
    if len(rows) == 1:
        return rows[0]
    segments: list[Tensor] = []
    positions: list[Tensor] = []
    parts: list[Part] = []
    clip_places: list[int] = []
    softs = []
    length = 0  # tokens of the rows so far
    clips = 0  # clips of the rows so far
    for group, row in enumerate(rows):
        segments.append(_as_group(row, group))
        own_positions = row.position_ids
        if own_positions is None:
            own_positions = torch.arange(len(row.input_ids))
        positions.append(own_positions)
        parts += [part.moved(length, clips=clips) for part in row.parts]
        clip_places += [length + place for place in row.clip_places]
        softs.append(row.soft.moved(length) if row.soft is not None else None)
        length += len(row.input_ids)
        clips += len(row.clips)
    # No token of a row predicts its first token; here the last token of the row before it would.
    labels = [torch.cat([row.labels.new_full((1,), IGNORE), row.labels[1:]]) for row in rows]
    sources = {row.source for row in rows}
    return replace(
        rows[0],
        id=", ".join(row.id for row in rows),
        source=sources.pop() if len(sources) == 1 else "several",
        input_ids=torch.cat([row.input_ids for row in rows]),
        labels=torch.cat(labels),
        is_media=torch.cat([row.is_media for row in rows]),
        clips=[clip for row in rows for clip in row.clips],
        clip_places=clip_places,
        parts=tuple(parts),
        segments=torch.cat(segments),
        position_ids=torch.cat(positions),
        soft=join(softs),
    )


def _as_group(row: Row, group: int) -> Tensor:
    """Return the segments ``(L, 2)`` of a row that becomes a group of a sequence."""
    number = torch.full((len(row.input_ids),), group)
    part = torch.zeros_like(number) if row.segments is None else row.segments[:, 1]
    return torch.stack([number, part], dim=1)
