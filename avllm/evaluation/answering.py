"""Greedy answers to many rows, fast: rows about the same clip share one pass of the connector and one of the LLM.

What the rows of a clip begin with in common (the media, mostly) is read once; its keys and values are then handed to
each row's own end. Answers are those that ``model.generate`` gives to each row alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from avllm.data.collate import gather_stream
from avllm.data.packing import shared_length
from avllm.data.row import Row
from avllm.inference.generation import Generation
from avllm.models.llm_calls import CachedRows, cache_is_selectable
from avllm.tokens import Tokens


@dataclass(frozen=True)
class Group:
    """Rows about the same media; the first ``shared`` tokens of each are the same and hold all of the media."""

    places: list[int]
    rows: list[Row]
    shared: int


def answer_rows(
    model: Any,
    processor: Any,
    rows: Sequence[Row],
    *,
    batch_size: int,
    max_new_tokens: int,
    decoding: dict[str, Any] | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Answers in the order of the rows.

    Args:
        model, processor: of one checkpoint.
        rows: prompts (``processor.row(..., answer=False)``); rows are about the same media when their clips are the
            same dict objects.
        batch_size: rows generated at a time.
        max_new_tokens: of an answer.
        decoding: ``{"type", **options}`` of a decoder, or None. With one, ``model.generate`` reads each row
            whole, since a decoder works there.
        progress: called with the number of rows done since the last call.
    """
    arguments = Generation(max_new_tokens=max_new_tokens, decoding=decoding).arguments(model, processor)
    shares = cache_is_selectable(model.llm) and not model.connector.conditioned and decoding is None
    found = [""] * len(rows)
    for groups in batches(group_rows(rows), batch_size):
        if shares:
            ids = _generate_shared(model, processor, groups, arguments)
        else:
            batch = processor.collate([row for g in groups for row in g.rows], padding_side="left")
            ids = model.generate(batch.to(model.device), **arguments)
        places = [i for g in groups for i in g.places]
        durations = [rows[place].duration for place in places]
        for place, text in zip(places, processor.decode(ids, durations), strict=True):
            found[place] = text
        progress(len(places))
    return found


def group_rows(rows: Sequence[Row]) -> list[Group]:
    """Rows by their media, the shortest beginnings first, so that a batch needs little padding."""
    by_media: dict[tuple[int, ...], list[int]] = {}
    for place, row in enumerate(rows):
        key = tuple(id(clip) for clip in row.clips)
        by_media.setdefault(key or (-1 - place,), []).append(place)
    groups: list[Group] = []
    for places in by_media.values():
        members = [rows[i] for i in places]
        shared = min(shared_length(members), *(len(r.input_ids) - 1 for r in members))
        if shared >= max(row.media_end for row in members):
            groups.append(Group(places, members, shared))
        else:  # a question before its clip shares nothing
            groups += [Group([i], [rows[i]], len(rows[i].input_ids) - 1) for i in places]
    return sorted(groups, key=lambda g: (g.shared, g.places))


def batches(groups: Sequence[Group], batch_size: int) -> Iterator[list[Group]]:
    """Groups in batches of at most ``batch_size`` rows; a larger group is cut."""
    batch: list[Group] = []
    room = batch_size
    for group in groups:
        for first in range(0, len(group.rows), batch_size):
            part = slice(first, first + batch_size)
            piece = replace(group, places=group.places[part], rows=group.rows[part])
            if batch and len(piece.rows) > room:
                yield batch
                batch, room = [], batch_size
            batch, room = [*batch, piece], room - len(piece.rows)
    if batch:
        yield batch


@torch.no_grad()
def _generate_shared(model: Any, processor: Any, groups: list[Group], arguments: dict[str, Any]) -> Tensor:
    """Read the beginning of each group once, then answer all rows from it: ``(R, new tokens)``."""
    heads = [_beginning(group) for group in groups]
    owner = torch.tensor([i for i, group in enumerate(groups) for _ in group.rows])  # (R,)
    batch = processor.collate([_without_media(head) for head in heads], padding_side="left").to(model.device)
    streams = connect_once(model, heads)
    embeds = model.merge_media(batch.input_ids, streams)  # (G, L, D)
    cached = model.prefill(embeds, batch, streams)
    rows = processor.collate([_without_media(heads[i]) for i in owner.tolist()], padding_side="left")
    clips = _clips_of(heads, owner)  # (B,)
    cached.select(owner.to(model.device), rows.to(model.device), clips.to(model.device))
    tails = [row.input_ids[group.shared :] for group in groups for row in group.rows]
    ids, real = pad_left(tails, processor.tokenizer.pad_token_id)
    return _greedy(cached, ids.to(model.device), real.to(model.device), arguments)


def _beginning(group: Group) -> Row:
    """Return the tokens that the rows of a group share, as one row."""
    row, shared = group.rows[0], slice(0, group.shared)
    return replace(row, input_ids=row.input_ids[shared], labels=row.labels[shared], is_media=row.is_media[shared])


def _without_media(row: Row) -> Row:
    """Return a row whose clips have places and no tensors: the connector's output for them is there already."""
    return replace(row, clips=[{} for _ in row.clips])


def _clips_of(heads: Sequence[Row], owner: Tensor) -> Tensor:
    """Return the number ``(B,)``, among the heads' clips, of each clip of rows that begin with head ``owner (R,)``."""
    first = [0]
    for head in heads:
        first.append(first[-1] + len(head.clips))
    numbers = [torch.arange(first[i], first[i + 1]) for i in owner.tolist()]
    return torch.cat(numbers)


def _greedy(cached: CachedRows, ids: Tensor, real: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Take the most likely token until each row has ended; what follows a row's end is padding.

    Args:
        ids, real: ``(R, L)``, the ends of the prompts and their bool mask.
    """
    ends = torch.tensor(arguments["eos_token_id"], device=ids.device)
    ended = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
    logits = cached.extend(ids, real)  # (R, V)
    answer: list[Tensor] = []
    while True:
        token = logits.argmax(-1).masked_fill(ended, arguments["pad_token_id"])  # (R,)
        answer.append(token)
        ended |= torch.isin(token, ends)
        if bool(ended.all()) or len(answer) == arguments["max_new_tokens"]:
            return torch.stack(answer, dim=1)
        logits = cached.extend(token[:, None])


def pad_left(items: Sequence[Tensor], value: int) -> tuple[Tensor, Tensor]:
    """Sequences ``(L_i,)`` -> ``(R, L)`` with padding in front, and the bool mask of what is real."""
    length = max(1, *(len(item) for item in items)) if items else 1
    out = torch.full((len(items), length), value)
    mask = torch.zeros(len(items), length, dtype=torch.bool)
    for i, item in enumerate(items):
        out[i, length - len(item) :] = item
        mask[i, length - len(item) :] = True
    return out, mask


def connect_once(model: Any, rows: Sequence[Row]) -> dict[str, Tokens]:
    """Return the connector's output for the rows' clips in order; a shared clip passes once."""
    clips = [clip for row in rows for clip in row.clips]
    distinct = {id(clip): clip for clip in clips}
    place = {key: i for i, key in enumerate(distinct)}
    index = torch.tensor([place[id(clip)] for clip in clips], dtype=torch.long, device=model.device)
    names = sorted({name for clip in distinct.values() for name in clip})
    media = {n: gather_stream(n, [c.get(n) for c in distinct.values()]).to(model.device) for n in names}
    made = model.connect(model.encode_media(media)) if media else {}
    return {name: tokens.select(index) for name, tokens in made.items()}
