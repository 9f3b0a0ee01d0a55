"""Rows of token ids and prepared media -> one batch. Streams hold the clips of all rows, one after the other."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from avllm.data.soft import Soft, join
from avllm.tokens import EncoderInput, StreamBatch, duration_of

IGNORE = -100  # label of a position that is not trained on; the value that torch and transformers skip


@dataclass(frozen=True)
class Row:
    """One sequence, ready for a batch.

    Attributes:
        input_ids: ``(L,)`` long, placeholders where media tokens will stand.
        labels: ``(L,)`` long, ``-100`` where not trained on.
        clips: the media parts in order, each ``{stream: EncoderInput}``.
        is_media: ``(L,)`` bool, True where a placeholder stands.
        clip_places: the place at which each clip's run begins, also that of an empty run.
        segments: ``(L, 2)`` long (group, part) of packed rows or None: see :class:`Batch`.
        position_ids: ``(L,)`` of packed rows or None for 0, 1, 2, ...
        targets: texts of the answers (one a packed question), for objectives that need them.
        soft: targets that are distributions, or None.
    """

    id: str
    input_ids: Tensor
    labels: Tensor
    clips: list[dict[str, EncoderInput]]
    is_media: Tensor
    source: str = "unknown"
    kind: str | None = None
    segments: Tensor | None = None
    position_ids: Tensor | None = None
    targets: list[str] = field(default_factory=list)
    clip_places: list[int] = field(default_factory=list)
    soft: Soft | None = None

    @property
    def num_targets(self) -> int:
        """Positions whose next token is trained on; the first position has no predecessor."""
        return int((self.labels[1:] != IGNORE).sum())

    @property
    def duration(self) -> float | None:
        """Return the seconds of the last clip, which an answer's times are about; None without one."""
        return duration_of(self.clips[-1]) if self.clips else None


@dataclass(frozen=True, eq=False)  # a batch is itself and equals no other
class Batch:
    """R rows and the B clips in them.

    Attributes:
        input_ids, labels, position_ids: ``(R, L)`` long.
        attention_mask: ``(R, L)`` bool, True = real.
        segments: ``(R, L, 2)`` long or None. Position j is seen from i when j <= i, both are of one group, and j is
            of i's part or of part 0 (what all parts of a group share). Group -1 is padding.
        streams: one stream of all B clips each.
        clip_row: ``(B,)`` long, the row of each clip.
        clip_at: ``(B,)`` long, the place in its row, padding counted, at which the clip's run begins.
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
    kinds: list[str | None]
    targets: list[list[str]]
    soft: Soft | None = None

    @property
    def num_targets(self) -> int:
        """Positions that the next-token loss counts."""
        return int((self.labels[:, 1:] != IGNORE).sum())

    def to(self, device: torch.device | str) -> Batch:
        """Move every tensor."""
        moved: dict[str, Any] = {f.name: _move(getattr(self, f.name), device) for f in fields(self)}
        return replace(self, **moved)

    def pin_memory(self) -> Batch:
        """Page-locked tensors, for asynchronous copies to a GPU."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        pinned: dict[str, Any] = {k: v.pin_memory() for k, v in plain.items() if isinstance(v, Tensor | Soft)}
        return replace(self, **pinned, streams={k: v.pin_memory() for k, v in self.streams.items()})


def _move(value: object, device: torch.device | str) -> object:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Soft):
        return value.to(device)
    if isinstance(value, dict):
        return {k: v.to(device) for k, v in value.items()}
    return value


def collate(
    rows: list[Row], pad_id: int, padding_side: str = "right", blanks: dict[str, EncoderInput] | None = None
) -> Batch:
    """Pad rows to one length and gather their clips stream by stream.

    Args:
        rows: at least one.
        pad_id: token id of padding.
        padding_side: ``right`` in training, ``left`` where text is generated behind the rows.
        blanks: a unit for each stream that no row has (its mask is all False), so that with several processes every one
            runs every module; None leaves such streams out.

    Raises:
        ValueError: no rows, or rows of which some bring features and some media for one stream.
    """
    if not rows:
        raise ValueError("no rows to collate; expected at least one")
    length = max(len(r.input_ids) for r in rows)
    clips = [(i, clip) for i, row in enumerate(rows) for clip in row.clips]
    if not clips and blanks:
        clips = [(0, {})]
    streams = {}
    for name in sorted({s for _, clip in clips for s in clip} | set(blanks or {})):
        items = [clip.get(name) for _, clip in clips]
        if all(item is None for item in items) and blanks:
            items[0] = replace(blanks[name], mask=torch.zeros_like(blanks[name].mask))
        streams[name] = gather_stream(name, items)
    packed = any(r.segments is not None for r in rows)
    return Batch(
        input_ids=_pad([r.input_ids for r in rows], length, pad_id, padding_side),
        attention_mask=_pad(
            [torch.ones(len(r.input_ids), dtype=torch.bool) for r in rows], length, False, padding_side
        ),
        labels=_pad([r.labels for r in rows], length, IGNORE, padding_side),
        position_ids=_pad([_positions(r) for r in rows], length, 0, padding_side),
        segments=_pad([_segments(r) for r in rows], length, -1, padding_side) if packed else None,
        streams=streams,
        clip_row=torch.tensor([i for i, _ in clips], dtype=torch.long),
        clip_at=_clip_places(rows, length, padding_side, len(clips)),
        ids=[r.id for r in rows],
        sources=[r.source for r in rows],
        kinds=[r.kind for r in rows],
        targets=[r.targets for r in rows],
        soft=_soft(rows, length, padding_side),
    )


def _clip_places(rows: list[Row], length: int, side: str, count: int) -> Tensor:
    """Return the places ``(B,)`` of all clips in the padded rows; a blank clip lies at the beginning of its row."""
    places = []
    for row in rows:
        padding = length - len(row.input_ids) if side == "left" else 0
        places += [padding + place for place in row.clip_places]
    return torch.tensor(places or [0] * count, dtype=torch.long)


def _soft(rows: list[Row], length: int, side: str) -> Soft | None:
    """Return the soft targets of all rows, at their places in the padded batch."""
    before = [length - len(row.input_ids) if side == "left" else 0 for row in rows]
    softs = [None if row.soft is None else row.soft.moved(before[n], n) for n, row in enumerate(rows)]
    return join(softs)


def _positions(row: Row) -> Tensor:
    return torch.arange(len(row.input_ids)) if row.position_ids is None else row.position_ids


def _segments(row: Row) -> Tensor:
    return torch.zeros(len(row.input_ids), 2, dtype=torch.long) if row.segments is None else row.segments


def _pad(items: list[Tensor], length: int, value: int | bool, side: str) -> Tensor:
    out = items[0].new_full((len(items), length, *items[0].shape[1:]), value)
    for i, item in enumerate(items):
        out[i, slice(0, len(item)) if side == "right" else slice(length - len(item), length)] = item
    return out


def gather_stream(name: str, items: list[EncoderInput | None]) -> StreamBatch:
    """One stream of B clips; clips without it have no units and an all-False mask."""
    present = [item for item in items if item is not None]
    known = {item.features is not None for item in present}
    if len(known) > 1:
        raise ValueError(
            f"stream {name!r}: some clips bring features and some bring media; expected one of the two for all"
        )
    b, t = len(items), max(item.mask.shape[0] for item in present)
    p = max(item.mask.shape[1] for item in present)
    mask = torch.zeros(b, t, p, dtype=torch.bool)
    span = torch.zeros(b, t, 2)
    units = torch.zeros(b, dtype=torch.long)
    for i, item in enumerate(items):
        if item is not None:
            steps, tokens = item.mask.shape
            mask[i, :steps, :tokens], span[i, :steps] = item.mask, item.span
            units[i] = len(next(iter(item.inputs.values()))) if item.inputs else 0
    extra = gather_extra(name, items, t)
    if known == {True}:
        return StreamBatch({}, units, span, mask, _pad_features(items, present, (b, t, p)), extra)
    inputs = {k: torch.cat([item.inputs[k] for item in present]) for k in present[0].inputs}
    return StreamBatch(inputs, units, span, mask, extra=extra)


def gather_extra(stream: str, items: list[EncoderInput | None], steps: int) -> dict[str, Tensor]:
    """Gather side information of B clips by name, ``(B, ...)``, padded with zeros in every dimension.

    Args:
        stream: for the message. items: the clips, None where one lacks the stream. steps: T of the batch.

    Raises:
        ValueError: one name has values of different kinds in two clips.
    """
    by_name: dict[str, dict[int, Tensor]] = {}
    for clip, item in enumerate(items):
        for name, value in (item.extra if item is not None else {}).items():
            by_name.setdefault(name, {})[clip] = value
    gathered = {}
    for name, values in by_name.items():
        kinds = {(value.dim(), value.dtype) for value in values.values()}
        if len(kinds) > 1:
            seen = f"stream {stream!r}: extra {name!r} has (dimensions, dtype) {sorted(map(str, kinds))}"
            raise ValueError(f"{seen}; expected the same in every clip")
        shape = [max(sizes) for sizes in zip(*(value.shape for value in values.values()), strict=True)]
        if shape[0] > 1:  # a value a step: a longer clip without it has steps, too
            shape[0] = steps
        out = next(iter(values.values())).new_zeros(len(items), *shape)
        for clip, value in values.items():
            corner = tuple(slice(0, size) for size in value.shape)
            out[clip][corner] = value
        gathered[name] = out
    return gathered


def _pad_features(
    items: list[EncoderInput | None], present: list[EncoderInput], shape: tuple[int, int, int]
) -> dict[str, Tensor]:
    padded = {}
    for layer, first in (present[0].features or {}).items():
        out = first.new_zeros(*shape, first.shape[-1])
        for i, item in enumerate(items):
            if item is not None and item.features is not None:
                x = item.features[layer]
                out[i, : x.shape[0], : x.shape[1]] = x
        padded[layer] = out
    return padded
