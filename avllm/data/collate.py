"""Collate rows of token ids and prepared media; streams hold the clips of all rows in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from avllm.data.row import IGNORE, Part, Row
from avllm.data.soft import Soft, join
from avllm.tokens import EncoderInput, StreamBatch


@dataclass(frozen=True)
class Places:
    """Pairs of owner and place; a place may belong to several owners.

    Attributes:
        owner: ``(k,)`` long, ascending.
        at: ``(k,)`` long, the owner's places.
        count: number of owners; some may own nothing.
    """

    owner: Tensor
    at: Tensor
    count: int

    @classmethod
    def of(cls, lists: Sequence[Sequence[int] | Tensor]) -> Places:
        """Return the places of each owner, given as one list an owner."""
        owners = [torch.full((len(places),), number) for number, places in enumerate(lists)]
        places = [torch.as_tensor(places, dtype=torch.long) for places in lists]
        nothing = torch.zeros(0, dtype=torch.long)
        return cls(torch.cat([nothing, *owners]), torch.cat([nothing, *places]), len(lists))

    def to(self, device: torch.device | str) -> Places:
        """Move both tensors."""
        owner = self.owner.to(device, non_blocking=True)
        at = self.at.to(device, non_blocking=True)
        return Places(owner, at, self.count)

    def sizes(self) -> Tensor:
        """Return how many places each owner has, ``(count,)``."""
        return self.owner.bincount(minlength=self.count)

    def sums(self, x: Tensor) -> Tensor:
        """Add up what lies at each owner's places: ``x (N, ...)`` -> ``(count, ...)``."""
        return x.new_zeros(self.count, *x.shape[1:]).index_add(0, self.owner, x[self.at])

    def means(self, x: Tensor) -> Tensor:
        """Average the values at each owner's places: ``x (N, D)`` -> ``(count, D)``; 0 for none."""
        return self.sums(x) / self.sizes().clamp(min=1).to(x.dtype)[:, None]

    def any(self, true: Tensor) -> Tensor:
        """Return whether one of each owner's places is True: ``(N,)`` bool -> ``(count,)`` bool."""
        return self.sums(true.long()) > 0

    def padded(self) -> tuple[Tensor, Tensor]:
        """Return the places of each owner in a row, padded, and which are real.

        Returns:
            ``(count, M)`` long and ``(count, M)`` bool, M >= 1.
        """
        sizes = self.sizes()
        width = max(1, int(sizes.max())) if self.count else 1
        real = torch.arange(width, device=sizes.device) < sizes[:, None]  # (count, M)
        places = torch.zeros_like(real, dtype=torch.long)
        places[real] = self.at  # pairs are sorted by owner, as the rows of `real` are
        return places, real

    def pick(self, chosen: Tensor) -> Places:
        """Return the places of the chosen owners, ``(count,)`` bool, numbered from 0."""
        number = chosen.cumsum(0) - 1  # (count,), of the chosen ones
        is_chosen = chosen[self.owner]  # (k,)
        return Places(number[self.owner[is_chosen]], self.at[is_chosen], int(chosen.sum()))


@dataclass(frozen=True)
class BatchParts:
    """The n parts of a batch's rows in order, as objectives read them.

    Attributes:
        row: ``(n,)`` long, the row of each.
        items: the parts with their texts, without their places.
        asked, trained: places of each part's question and answer in the flattened ``(R * L)``
            positions.
        clip_set: ``(n,)`` long, the number of the set of clips that the part can see; parts of a
            packed row share one.
        set_clips: the clips of each set, by their place among the batch's B clips.
    """

    row: Tensor
    items: list[Part]
    asked: Places
    trained: Places
    clip_set: Tensor
    set_clips: Places

    def __len__(self) -> int:
        return len(self.items)

    @property
    def has_target(self) -> Tensor:
        """Return which parts have an answer, ``(n,)`` bool."""
        return self.trained.sizes() > 0

    def is_true(self, of: Sequence[bool]) -> Tensor:
        """Return one bool a part as a tensor ``(n,)`` beside the others."""
        return torch.tensor(of, dtype=torch.bool, device=self.row.device)

    def role_is(self, *roles: str) -> Tensor:
        """Return which parts have one of these roles, ``(n,)`` bool."""
        return self.is_true([part.role in roles for part in self.items])

    def to(self, device: torch.device | str) -> BatchParts:
        """Move every tensor."""
        moved: dict[str, Any] = {f.name: _move(getattr(self, f.name), device) for f in fields(self)}
        return replace(self, **moved)


@dataclass(frozen=True, eq=False)  # a batch is itself and equals no other
class Batch:
    """R rows and the B clips in them.

    Attributes:
        input_ids, labels, position_ids: ``(R, L)`` long.
        attention_mask: ``(R, L)`` bool, True = real.
        segments: ``(R, L, 2)`` long (group, segment) or None. Position j is seen from i when
            j <= i, both are of one group, and j is of i's segment or of segment 0 (which all
            segments of a group share). Group -1 is padding.
        streams: one stream of all B clips each.
        clip_row: ``(B,)`` long, the row of each clip.
        clip_at: ``(B,)`` long, the place in its row, padding counted, where the clip's run begins.
        parts: the questions and answers of all rows.
        variant: of the rows, see :class:`~avllm.data.row.Row`.
        soft: targets that are distributions, or None.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    position_ids: Tensor
    segments: Tensor | None
    streams: dict[str, StreamBatch]
    clip_row: Tensor
    clip_at: Tensor
    ids: list[str]
    sources: list[str]
    parts: BatchParts
    variant: str | None = None
    soft: Soft | None = None

    @property
    def num_targets(self) -> int:
        """Count the positions that the next-token loss counts."""
        return int((self.labels[:, 1:] != IGNORE).sum())

    def to(self, device: torch.device | str) -> Batch:
        """Move every tensor."""
        moved: dict[str, Any] = {f.name: _move(getattr(self, f.name), device) for f in fields(self)}
        return replace(self, **moved)

    def pin_memory(self) -> Batch:
        """Return page-locked tensors, for asynchronous copies to a GPU."""
        streams = {name: stream.pin_memory() for name, stream in self.streams.items()}
        pinned: dict[str, Any] = {"streams": streams}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, Tensor):
                pinned[entry.name] = value.pin_memory()
        return replace(self, **pinned)


def _move(value: object, device: torch.device | str) -> object:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Places | BatchParts | Soft):
        return value.to(device)
    if isinstance(value, dict):
        return {k: v.to(device) for k, v in value.items()}
    return value


def collate(
    rows: list[Row],
    pad_id: int,
    padding_side: str = "right",
    blanks: dict[str, EncoderInput] | None = None,
) -> Batch:
    """Pad rows to one length and gather their clips stream by stream.

    Args:
        rows: at least one, of one variant.
        pad_id: token id of padding.
        padding_side: ``right`` in training, ``left`` where text is generated after the rows.
        blanks: a unit for each stream that no row has (its mask is all False), so that with several
            processes every one runs every module; None leaves such streams out.

    Raises:
        ValueError: no rows, rows of several variants, or rows of which some bring features and some
            media for one stream.
    """
    variants = {row.variant for row in rows}
    if len(variants) != 1:
        raise ValueError(
            f"{len(rows)} rows of variants {sorted(map(str, variants))}; expected one variant"
        )
    return Batch(
        **_pad_rows(rows, pad_id, padding_side),
        **_gather_clips(rows, blanks),
        clip_at=_clip_places(rows, padding_side, blank=bool(blanks)),
        ids=[row.id for row in rows],
        sources=[row.source for row in rows],
        parts=gather_parts(rows, padding_side),
        variant=variants.pop(),
        soft=_soft(rows, padding_side),
    )


def _pad_rows(rows: list[Row], pad_id: int, side: str) -> dict[str, Any]:
    """Return the tensors ``(R, L, ...)`` of a batch that have one entry a position."""
    length = max(len(row.input_ids) for row in rows)
    real = [torch.ones(len(row.input_ids), dtype=torch.bool) for row in rows]
    packed = any(row.segments is not None for row in rows)
    segments = [_segments(row) for row in rows] if packed else []
    return {
        "input_ids": _pad([row.input_ids for row in rows], length, pad_id, side),
        "attention_mask": _pad(real, length, False, side),
        "labels": _pad([row.labels for row in rows], length, IGNORE, side),
        "position_ids": _pad([_positions(row) for row in rows], length, 0, side),
        "segments": _pad(segments, length, -1, side) if packed else None,
    }


def _gather_clips(rows: list[Row], blanks: dict[str, EncoderInput] | None) -> dict[str, Any]:
    """Return the streams of all clips of a batch, and the row of each clip."""
    clips = [clip for row in rows for clip in row.clips]
    owners = [number for number, row in enumerate(rows) for _ in row.clips]
    if not clips and blanks:
        clips, owners = [{}], [0]
    names = {name for clip in clips for name in clip} | set(blanks or {})
    streams = {}
    for name in sorted(names):
        items = [clip.get(name) for clip in clips]
        if all(item is None for item in items) and blanks:
            items[0] = replace(blanks[name], mask=torch.zeros_like(blanks[name].mask))
        streams[name] = gather_stream(name, items)
    return {"streams": streams, "clip_row": torch.tensor(owners, dtype=torch.long)}


def _clip_places(rows: list[Row], side: str, blank: bool) -> Tensor:
    """Return the places ``(B,)`` of all clips in the padded rows; of a blank clip, the start."""
    length = max(len(row.input_ids) for row in rows)
    places = []
    for row in rows:
        padding = length - len(row.input_ids) if side == "left" else 0
        places += [padding + place for place in row.clip_places or [0] * len(row.clips)]
    if not places and blank:
        places = [0]
    return torch.tensor(places, dtype=torch.long)


def gather_parts(rows: Sequence[Row], padding_side: str = "right") -> BatchParts:
    """Gather the parts of rows, with the places that they have in the padded batch."""
    length = max(len(row.input_ids) for row in rows)
    items: list[Part] = []
    owners: list[int] = []
    asked: list[Tensor] = []
    trained: list[Tensor] = []
    set_numbers: dict[tuple[int, ...], int] = {}  # of each distinct set of clips
    clip_sets: list[int] = []
    first_clip = 0
    # A tensor left in a part would be an open file between loader worker and process.
    nothing = torch.zeros(0, dtype=torch.long)
    for number, row in enumerate(rows):
        padding = length - len(row.input_ids) if padding_side == "left" else 0
        start = number * length + padding
        for part in row.parts:
            items.append(replace(part, asked=nothing, trained=nothing))
            owners.append(number)
            asked.append(part.asked + start)
            trained.append(part.trained + start)
            clips = tuple(first_clip + clip for clip in part.clips)
            clip_sets.append(set_numbers.setdefault(clips, len(set_numbers)))
        first_clip += len(row.clips)
    return BatchParts(
        row=torch.tensor(owners, dtype=torch.long),
        items=items,
        asked=Places.of(asked),
        trained=Places.of(trained),
        clip_set=torch.tensor(clip_sets, dtype=torch.long),
        set_clips=Places.of(list(set_numbers)),
    )


def _soft(rows: list[Row], side: str) -> Soft | None:
    """Return the soft targets of all rows, at their places in the padded batch."""
    length = max(len(row.input_ids) for row in rows)
    softs = []
    for number, row in enumerate(rows):
        padding = length - len(row.input_ids) if side == "left" else 0
        softs.append(None if row.soft is None else row.soft.moved(padding, number))
    return join(softs)


def _positions(row: Row) -> Tensor:
    return torch.arange(len(row.input_ids)) if row.position_ids is None else row.position_ids


def _segments(row: Row) -> Tensor:
    if row.segments is not None:
        return row.segments
    return torch.zeros(len(row.input_ids), 2, dtype=torch.long)  # one group of one segment


def _pad(items: list[Tensor], length: int, value: int | bool, side: str) -> Tensor:
    padded = items[0].new_full((len(items), length, *items[0].shape[1:]), value)
    for i, item in enumerate(items):
        start = length - len(item) if side == "left" else 0
        padded[i, start : start + len(item)] = item
    return padded


def gather_stream(name: str, items: list[EncoderInput | None]) -> StreamBatch:
    """Gather one stream of B clips; clips without it have no units and an all-False mask."""
    present = [item for item in items if item is not None]
    has_features = {item.features is not None for item in present}
    if len(has_features) > 1:
        raise ValueError(
            f"stream {name!r}: some clips bring features, some media; expected one of the two"
        )
    t = max(item.mask.shape[0] for item in present)
    p = max(item.mask.shape[1] for item in present)
    b = len(items)
    mask = torch.zeros(b, t, p, dtype=torch.bool)
    span = torch.zeros(b, t, 2)
    units = torch.zeros(b, dtype=torch.long)
    for i, item in enumerate(items):
        if item is not None:
            steps, tokens = item.mask.shape
            mask[i, :steps, :tokens] = item.mask
            span[i, :steps] = item.span
            units[i] = len(next(iter(item.inputs.values()))) if item.inputs else 0
    extra = gather_extra(name, items, t)
    if has_features == {True}:
        return StreamBatch({}, units, span, mask, _pad_features(items, present, (b, t, p)), extra)
    inputs = {k: torch.cat([item.inputs[k] for item in present]) for k in present[0].inputs}
    return StreamBatch(inputs, units, span, mask, extra=extra)


def gather_extra(stream: str, items: list[EncoderInput | None], steps: int) -> dict[str, Tensor]:
    """Gather side information of B clips by name, ``(B, ...)``, padded with zeros.

    Args:
        items: the clips, None where one lacks the stream.
        steps: T of the batch.

    Raises:
        ValueError: one name has values of different kinds in two clips.
    """
    by_name: dict[str, dict[int, Tensor]] = {}
    for clip, item in enumerate(items):
        if item is None:
            continue
        for name, value in item.extra.items():
            by_name.setdefault(name, {})[clip] = value
    gathered = {}
    for name, values in by_name.items():
        kinds = {(value.dim(), value.dtype) for value in values.values()}
        if len(kinds) > 1:
            raise ValueError(
                f"stream {stream!r}: extra {name!r} has (dimensions, dtype) "
                f"{sorted(map(str, kinds))}; expected the same in every clip"
            )
        shapes = [value.shape for value in values.values()]
        shape = [max(sizes) for sizes in zip(*shapes, strict=True)]
        if shape[0] > 1:  # a value a step: a longer clip without it has steps, too
            shape[0] = steps
        out = next(iter(values.values())).new_zeros(len(items), *shape)
        for clip, value in values.items():
            out[clip][tuple(slice(size) for size in value.shape)] = value
        gathered[name] = out
    return gathered


def _pad_features(
    items: list[EncoderInput | None], present: list[EncoderInput], shape: tuple[int, int, int]
) -> dict[str, Tensor]:
    padded = {}
    for layer, first in (present[0].features or {}).items():
        whole = first.new_zeros(*shape, first.shape[-1])
        for i, item in enumerate(items):
            if item is not None and item.features is not None:
                x = item.features[layer]
                whole[i, : x.shape[0], : x.shape[1]] = x
        padded[layer] = whole
    return padded
