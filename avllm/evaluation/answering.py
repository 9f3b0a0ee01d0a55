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
from transformers.cache_utils import DynamicCache, DynamicLayer

from avllm.data.collate import Row, gather_stream
from avllm.data.packing import media_end_of, shared_length
from avllm.inference.generation import Generation
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
    progress: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Answers in the order of the rows.

    Args:
        model, processor: of one checkpoint.
        rows: prompts (``processor.row(..., answer=False)``); rows are about the same media when their clips are the
            same dict objects.
        batch_size: rows generated at a time.
        max_new_tokens: of an answer.
        progress: called with the number of rows done since the last call.
    """
    arguments = Generation(max_new_tokens=max_new_tokens).arguments(model, processor)
    found = [""] * len(rows)
    for groups in batches(group_rows(rows), batch_size):
        ids = None if model.connector.conditioned else _generate_shared(model, processor, groups, arguments)
        if ids is None:
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
        if shared >= max(media_end_of(row) for row in members):
            groups.append(Group(places, members, shared))
        else:  # questions that stand before their clip share nothing
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
def _generate_shared(model: Any, processor: Any, groups: list[Group], arguments: dict[str, Any]) -> Tensor | None:
    """``(R, new tokens)``; None where the LLM's cache cannot be handed on (sliding windows, states)."""
    heads = [replace(g.rows[0], input_ids=g.rows[0].input_ids[: g.shared]) for g in groups]
    cache = DynamicCache(config=model.llm.config.get_text_config())
    if not all(type(layer) is DynamicLayer for layer in cache.layers):
        return None
    device = model.device
    head_ids, head_mask = pad_left([h.input_ids for h in heads], processor.tokenizer.pad_token_id)
    embeds = model.merge_media(head_ids.to(device), connect_once(model, heads))  # (G, L, D)
    step = {"attention_mask": head_mask.long().to(device), "position_ids": positions(head_mask).to(device)}
    model.llm(inputs_embeds=embeds, past_key_values=cache, use_cache=True, logits_to_keep=1, **step)
    owner = torch.tensor([i for i, g in enumerate(groups) for _ in g.rows])  # (R,)
    cache.batch_select_indices(owner.to(device))
    tails = [row.input_ids[g.shared :] for g in groups for row in g.rows]
    tail_ids, tail_mask = pad_left(tails, processor.tokenizer.pad_token_id)
    shared = torch.tensor([g.shared for g in groups])[owner]  # (R,)
    at = (positions(tail_mask) + shared[:, None]).to(device)
    mask = torch.cat([head_mask[owner], tail_mask], 1).to(device)
    return _greedy(model.llm, tail_ids.to(device), mask, at, cache, arguments)


def _greedy(llm: Any, ids: Tensor, mask: Tensor, at: Tensor, cache: DynamicCache, arguments: dict[str, Any]) -> Tensor:
    """The most likely token again and again, until each row has ended; what follows a row's end is padding."""
    ends = torch.tensor(arguments["eos_token_id"], device=ids.device)
    ended = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
    said: list[Tensor] = []
    for _ in range(arguments["max_new_tokens"]):
        out = llm(
            input_ids=ids,
            attention_mask=mask.long(),
            position_ids=at,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        ids = out.logits[:, -1:].argmax(-1).masked_fill(ended[:, None], arguments["pad_token_id"])  # (R, 1)
        said.append(ids)
        ended |= torch.isin(ids[:, 0], ends)
        if bool(ended.all()):
            break
        mask = torch.nn.functional.pad(mask, (0, 1), value=True)
        at = at[:, -1:] + 1
    return torch.cat(said, 1)


def pad_left(items: Sequence[Tensor], value: int) -> tuple[Tensor, Tensor]:
    """Sequences ``(L_i,)`` -> ``(R, L)`` with padding in front, and the bool mask of what is real."""
    length = max(1, *(len(item) for item in items)) if items else 1
    out = torch.full((len(items), length), value)
    mask = torch.zeros(len(items), length, dtype=torch.bool)
    for i, item in enumerate(items):
        out[i, length - len(item) :] = item
        mask[i, length - len(item) :] = True
    return out, mask


def positions(mask: Tensor) -> Tensor:
    """``(R, L)``: 0, 1, 2, ... over the real tokens of each row."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def connect_once(model: Any, rows: Sequence[Row]) -> dict[str, Tokens]:
    """The connector's output for the rows' clips in order; a clip that stands in several rows passes once."""
    clips = [clip for row in rows for clip in row.clips]
    distinct = {id(clip): clip for clip in clips}
    place = {key: i for i, key in enumerate(distinct)}
    index = torch.tensor([place[id(clip)] for clip in clips], dtype=torch.long, device=model.device)
    names = sorted({name for clip in distinct.values() for name in clip})
    media = {n: gather_stream(n, [c.get(n) for c in distinct.values()]).to(model.device) for n in names}
    made = model.connect(model.encode_media(media)) if media else {}
    return {name: tokens.select(index) for name, tokens in made.items()}
