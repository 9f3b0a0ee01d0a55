"""Answer many rows greedily; rows about the same clip share one pass of connector and LLM.

The LLM reads the common beginning of a clip's rows (the media, mostly) once; each row then goes on
from its keys and values. The answers are those that ``model.generate`` gives to each row alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from avllm.data.collate import gather_stream
from avllm.data.packing import shared_length
from avllm.data.row import Row
from avllm.inference.generation import Generation, answers_of
from avllm.log import logger
from avllm.models.llm_calls import CachedRows, cache_is_selectable
from avllm.tokens import Tokens

LOG = logger(__name__)


@dataclass(frozen=True)
class Group:
    """Rows about the same media.

    Attributes:
        places: of the rows in the list that is answered.
        shared: tokens with which every row of the group begins; they hold all of the media.
    """

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
    """Return the answers in the order of the rows.

    Args:
        model, processor: of one checkpoint.
        rows: prompts (``processor.row(..., answer=False)``); rows are about the same media when
            their clips are the same dict objects.
        batch_size: rows generated at a time.
        max_new_tokens: of an answer.
        decoding: ``{"type", **options}`` of a decoder, or None. With one, ``model.generate`` reads
            each row whole, since a decoder works there.
        progress: called with the number of rows done since the last call.
    """
    generation = Generation(max_new_tokens=max_new_tokens, decoding=decoding)
    arguments = generation.arguments(model, processor)
    can_share = cache_is_selectable(model.llm) and not model.connector.conditioned
    answers = [""] * len(rows)
    warnings: Counter[str] = Counter()
    for groups in batches(group_rows(rows), batch_size):
        if can_share and decoding is None:
            ids = _generate_shared(model, processor, groups, arguments)
        else:
            whole = [row for group in groups for row in group.rows]
            batch = processor.collate(whole, padding_side="left")
            ids = model.generate(batch.to(model.device), **arguments)
        places = [place for group in groups for place in group.places]
        written = answers_of(processor, [rows[place] for place in places], ids)
        for place, answer in zip(places, written, strict=True):
            answers[place] = answer.text
            warnings.update(answer.warnings)
        progress(len(places))
    for warning, count in warnings.items():
        LOG.warning("in %d of %d answers: %s", count, len(rows), warning)
    return answers


def group_rows(rows: Sequence[Row]) -> list[Group]:
    """Group rows by their media; groups of the shortest beginnings first, to save padding."""
    by_media: dict[tuple[int, ...], list[int]] = {}
    for place, row in enumerate(rows):
        alone = (-1 - place,)  # a row without media is a group by itself
        key = tuple(id(clip) for clip in row.clips) or alone
        by_media.setdefault(key, []).append(place)
    groups: list[Group] = []
    for places in by_media.values():
        members = [rows[place] for place in places]
        # The last token of each row is not shared: the answer's first token is predicted from it.
        longest = min(len(row.input_ids) for row in members) - 1
        shared = min(shared_length(members), longest)
        if shared >= max(row.media_end for row in members):
            groups.append(Group(places, members, shared))
            continue
        # A question comes before its clip: the rows do not begin alike.
        for place, row in zip(places, members, strict=True):
            groups.append(Group([place], [row], len(row.input_ids) - 1))
    return sorted(groups, key=lambda group: (group.shared, group.places))


def batches(groups: Sequence[Group], batch_size: int) -> Iterator[list[Group]]:
    """Yield groups in batches of at most ``batch_size`` rows; a larger group is cut."""
    batch: list[Group] = []
    room = batch_size
    for group in groups:
        for first in range(0, len(group.rows), batch_size):
            part = slice(first, first + batch_size)
            piece = replace(group, places=group.places[part], rows=group.rows[part])
            if batch and len(piece.rows) > room:
                yield batch
                batch = []
                room = batch_size
            batch.append(piece)
            room -= len(piece.rows)
    if batch:
        yield batch


@torch.no_grad()
def _generate_shared(
    model: Any, processor: Any, groups: list[Group], arguments: dict[str, Any]
) -> Tensor:
    """Read the beginning of each of G groups once, then answer all R rows: ``(R, new tokens)``."""
    heads = [_beginning(group) for group in groups]
    sizes = torch.tensor([len(group.rows) for group in groups])
    owner = torch.arange(len(groups)).repeat_interleave(sizes)  # (R,), the group of each row
    bare = [_without_media(head) for head in heads]
    batch = processor.collate(bare, padding_side="left").to(model.device)
    streams = connect_once(model, heads)
    embeds = model.merge_media(batch.input_ids, streams)  # (G, L, D)
    cached = model.prefill(embeds, batch, streams)
    rows = processor.collate([bare[number] for number in owner.tolist()], padding_side="left")
    clips = _clips_of(heads, owner)  # (B,)
    cached.select(owner.to(model.device), rows.to(model.device), clips.to(model.device))
    tails = [row.input_ids[group.shared :] for group in groups for row in group.rows]
    ids, real = pad_left(tails, processor.tokenizer.pad_token_id)
    return _greedy(cached, ids.to(model.device), real.to(model.device), arguments)


def _beginning(group: Group) -> Row:
    """Return the tokens that the rows of a group share, as one row."""
    row = group.rows[0]
    return replace(
        row,
        input_ids=row.input_ids[: group.shared],
        labels=row.labels[: group.shared],
        is_media=row.is_media[: group.shared],
    )


def _without_media(row: Row) -> Row:
    """Return a row whose clips have places and no tensors: the connector has read them already."""
    return replace(row, clips=[{} for _ in row.clips])


def _clips_of(heads: Sequence[Row], owner: Tensor) -> Tensor:
    """Return the place among the heads' clips of each of the rows' B clips, ``(B,)``.

    Args:
        heads: the beginnings of rows, with their clips.
        owner: ``(R,)``, the head of each row.
    """
    numbers_by_head = []
    first = 0
    for head in heads:
        numbers_by_head.append(torch.arange(first, first + len(head.clips)))
        first += len(head.clips)
    return torch.cat([numbers_by_head[head] for head in owner.tolist()])


def _greedy(cached: CachedRows, ids: Tensor, real: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Take the most likely token until each row has ended; after a row's end comes padding.

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
    """Pad sequences ``(L_i,)`` in front; return ``(R, L)`` and the bool mask of real places."""
    length = max([1, *map(len, items)])
    out = torch.full((len(items), length), value)
    mask = torch.zeros(len(items), length, dtype=torch.bool)
    for i, item in enumerate(items):
        out[i, length - len(item) :] = item
        mask[i, length - len(item) :] = True
    return out, mask


def connect_once(model: Any, rows: Sequence[Row]) -> dict[str, Tokens]:
    """Return the connector's output for the rows' clips in order; a shared clip passes once."""
    clips = [clip for row in rows for clip in row.clips]
    distinct: list[dict[str, Any]] = []
    place_by_id: dict[int, int] = {}
    for clip in clips:
        if id(clip) not in place_by_id:
            place_by_id[id(clip)] = len(distinct)
            distinct.append(clip)
    places = [place_by_id[id(clip)] for clip in clips]
    media = {}
    for name in sorted({name for clip in distinct for name in clip}):
        items = [clip.get(name) for clip in distinct]
        media[name] = gather_stream(name, items).to(model.device)
    if not media:
        return {}
    index = torch.tensor(places, dtype=torch.long, device=model.device)
    streams = model.connect(model.encode_media(media))
    return {name: tokens.select(index) for name, tokens in streams.items()}
