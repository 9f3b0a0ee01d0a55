"""Pairs of a clip's streams and its text: which rows have them, their tokens, whose texts are equal, and mismatches."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from avllm.data.collate import Batch
    from avllm.tokens import Tokens

JOINS = {"av": ("video", "audio")}
"""Short names of streams that are taken together."""


@dataclass(frozen=True)
class Pair:
    """Two sides that belong together.

    Attributes:
        left: the streams whose tokens are pooled for the one side.
        right: those of the other side; empty where that is the text.
    """

    left: tuple[str, ...]
    right: tuple[str, ...] = ()

    @property
    def streams(self) -> tuple[str, ...]:
        """All streams that a row has to have."""
        return (*self.left, *self.right)


def parse_pair(name: str) -> Pair:
    """Read the name of a pair: ``audio-text``, ``speech+video-text``, ``video-audio``; ``av`` is ``video+audio``.

    Raises:
        ValueError: it is no name of two sides.
    """
    sides = [JOINS.get(side, tuple(side.split("+"))) for side in name.split("-")]
    names = [stream for side in sides for stream in side]
    is_pair = len(sides) == 2 and all(names) and sides[0] != ("text",) and len(set(names)) == len(names)
    if not is_pair or (sides[1] != ("text",) and "text" in names):
        raise ValueError(
            f"objectives: {name!r} is no pair; expected two sides, of streams or, the second, of the text: "
            "audio-text, speech+video-text, video-audio"
        )
    return Pair(sides[0], () if sides[1] == ("text",) else sides[1])


def check_pairs(names: Sequence[str], model: Any) -> list[str]:
    """Check that pairs are of the model's streams and name each once; return them.

    Raises:
        ValueError: a name that is no pair, or a stream that no encoder of the model gives.
    """
    for name in names:
        unknown = [s for s in parse_pair(name).streams if s not in model.encoders]
        if unknown:
            raise ValueError(
                f"objectives: pair {name!r} reads stream {unknown[0]!r}; rows are counted by the encoders' streams, "
                f"so expected some of {sorted(model.encoders)}"
            )
    if len(set(names)) < len(names):
        raise ValueError(f"objectives: pairs are {list(names)}; expected each once")
    return list(names)


def default_pairs(model: Any) -> list[str]:
    """Return each stream with the text, and all of them together with it."""
    streams = sorted(model.encoders, reverse=True)
    together = "av" if streams == ["video", "audio"] else "+".join(streams)
    alone = [f"{stream}-text" for stream in streams]
    return [*alone, f"{together}-text"] if len(streams) > 1 else alone


def pool_rows(streams: dict[str, Tokens], names: tuple[str, ...], clip_row: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Mean of the real tokens of the named streams over all clips of each row; streams weigh the same.

    Args:
        streams: connector output, Tokens with x ``(B, T, P, D)``.
        clip_row: ``(B,)`` the row of each clip.
        rows: R.

    Returns:
        ``(R, D)``, zero where nothing is real, and ``(R,)`` bool, True where **every** named stream is there.
    """
    sums, there = [], []
    for name in names:
        x, mask = streams[name].flat()  # (B, N, D), (B, N)
        total = x.new_zeros(rows, x.shape[-1]).index_add(0, clip_row, (x * mask[..., None]).sum(1))  # (R, D)
        count = x.new_zeros(rows).index_add(0, clip_row, mask.sum(1).to(x.dtype))  # (R,)
        sums.append(total / count.clamp(min=1)[:, None])
        there.append(count > 0)
    return torch.stack(sums).mean(0), torch.stack(there).all(0)


def tokens_by_row(streams: dict[str, Tokens], clip_row: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """All connector tokens of all clips of each row, ``(R, M, D)``, and which are real, ``(R, M)``.

    Args:
        streams: connector output of B clips. clip_row: ``(B,)`` the row of each clip. rows: R.
    """
    flat = [tokens.flat() for tokens in streams.values()]
    x, mask = torch.cat([f[0] for f in flat], 1), torch.cat([f[1] for f in flat], 1)  # (B, N, D), (B, N)
    same = clip_row[:, None] == clip_row[None]  # (B, B)
    place = same.tril(-1).sum(1)  # (B,) clips of the same row before this one
    most = int(place.max()) + 1 if len(place) else 1
    out = x.new_zeros(rows, most, *x.shape[1:])
    real = mask.new_zeros(rows, most, mask.shape[1])
    return out.index_put((clip_row, place), x).flatten(1, 2), real.index_put((clip_row, place), mask).flatten(1, 2)


def text_id(text: str) -> int:
    """A 63-bit number that equal texts share on every process and in every run."""
    return int.from_bytes(hashlib.blake2b(text.strip().encode(), digest_size=8).digest(), "little") >> 1


def text_ids(batch: Batch, same: str = "text") -> Tensor:
    """``(R,)`` the id of each row's answer; with ``same="kind"`` that of its kind, where it has one."""
    texts = ["\n".join(row) for row in batch.targets]
    if same == "kind":
        texts = [t if kind is None else f"kind {kind}" for t, kind in zip(texts, batch.kinds, strict=True)]
    ids = [text_id(t) for t in texts]
    return torch.tensor(ids, dtype=torch.long, device=batch.labels.device)


def rows_of(batch: Batch, pair: str) -> Tensor:
    """``(R,)`` bool: rows with every stream of the pair, by the encoders' masks, and with a text where it is a side."""
    sides = parse_pair(pair)
    rows = torch.ones_like(batch.labels[:, 0], dtype=torch.bool)
    if not sides.right:
        rows = (batch.labels >= 0).any(1)
    for name in sides.streams:
        rows = rows & has_stream(batch, name)
    return rows


def has_stream(batch: Batch, name: str) -> Tensor:
    """``(R,)`` bool: rows of which a clip has the stream."""
    rows = torch.zeros(batch.labels.shape[0], dtype=torch.bool, device=batch.labels.device)
    if name in batch.streams:
        present = batch.streams[name].mask.flatten(1).any(1)  # (B,)
        rows[batch.clip_row[present]] = True
    return rows


def chosen_rows(batch: Batch, captions_only: bool) -> Tensor:
    """``(R,)`` bool: all rows, or those that are no questions (that have no ``kind``)."""
    chosen = [not captions_only or kind in (None, "caption") for kind in batch.kinds]
    return torch.tensor(chosen, device=batch.labels.device)


def sample_negatives(similarity: Tensor, same: Tensor, scale: float = 10.0) -> tuple[Tensor, Tensor]:
    """For each row a key that is not its own, the likelier the more similar.

    Args:
        similarity: ``(n, N)`` cosines; same: ``(n, N)`` bool, keys that may not be drawn.
        scale: inverse temperature of the draw.

    Returns:
        ``(n,)`` long, the drawn key, and ``(n,)`` bool, False where every key is the row's own.
    """
    possible = ~same.all(1)
    logits = (scale * similarity).masked_fill(same, -torch.inf)
    logits = torch.where(possible[:, None], logits, torch.zeros_like(logits))
    return torch.multinomial(logits.softmax(1), 1).squeeze(1) if len(logits) else possible.long(), possible


def matching_loss(positive: Tensor, negatives: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Binary cross-entropy of one matching and some mismatched pairs a row, averaged within the row, summed over rows.

    Args:
        positive: ``(n,)`` logits of matching pairs.
        negatives: logits ``(n,)`` of mismatched pairs, and bool ``(n,)``, which of them exist.
    """
    total, count = F.softplus(-positive), torch.ones_like(positive)
    for logits, there in negatives:
        total, count = total + F.softplus(logits) * there, count + there
    return (total / count).sum()
