"""Pairs of a clip's streams and its text: the parts that have them, their tokens, equal texts, and mismatches."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from avllm.data.collate import Batch, BatchParts, Places
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


def pool_clip_sets(streams: dict[str, Tokens], names: tuple[str, ...], sets: Places) -> tuple[Tensor, Tensor]:
    """Average the real tokens of the named streams over the clips of each set; streams weigh the same.

    Args:
        streams: connector output, Tokens with x ``(B, T, P, D)``.
        sets: the clips of each of S sets.

    Returns:
        ``(S, D)``, zero where nothing is real, and ``(S,)`` bool, True where **every** named stream is present.
    """
    means, present = [], []
    for name in names:
        x, mask = streams[name].flat()  # (B, N, D), (B, N)
        total = sets.sums((x * mask[..., None]).sum(1))  # (S, D)
        count = sets.sums(mask.sum(1).to(x.dtype))  # (S,)
        means.append(total / count.clamp(min=1)[:, None])
        present.append(count > 0)
    return torch.stack(means).mean(0), torch.stack(present).all(0)


def tokens_by_clip_set(streams: dict[str, Tokens], sets: Places) -> tuple[Tensor, Tensor]:
    """Return all connector tokens of the clips of each set, ``(S, M, D)``, and which are real, ``(S, M)``.

    Args:
        streams: connector output of B clips. sets: the clips of each of S sets.
    """
    flat = [tokens.flat() for tokens in streams.values()]
    x = torch.cat([features for features, _ in flat], 1)  # (B, N, D)
    mask = torch.cat([real for _, real in flat], 1)  # (B, N)
    clips, is_clip = sets.padded()  # (S, C)
    real = mask[clips] & is_clip[..., None]  # (S, C, N)
    return x[clips].flatten(1, 2), real.flatten(1, 2)


def text_id(text: str) -> int:
    """A 63-bit number that equal texts share on every process and in every run."""
    return int.from_bytes(hashlib.blake2b(text.strip().encode(), digest_size=8).digest(), "little") >> 1


def text_ids(parts: BatchParts, same: str = "text") -> Tensor:
    """Return the id of each part's answer ``(n,)``; with ``same="kind"`` that of its kind, where it has one."""
    texts = [part.target for part in parts.items]
    if same == "kind":
        texts = [part.target if part.kind is None else f"kind {part.kind}" for part in parts.items]
    return torch.tensor([text_id(text) for text in texts], dtype=torch.long, device=parts.row.device)


def parts_with(batch: Batch, pair: str) -> Tensor:
    """Return which parts have every stream of the pair, and a text where it is a side, ``(n,)`` bool.

    Streams count by the encoders' masks, before anything is computed.
    """
    sides = parse_pair(pair)
    chosen = torch.ones_like(batch.parts.row, dtype=torch.bool) if sides.right else batch.parts.has_target
    for name in sides.streams:
        chosen = chosen & has_stream(batch, name)
    return chosen


def has_stream(batch: Batch, name: str) -> Tensor:
    """Return which parts see a clip that has the stream, ``(n,)`` bool."""
    parts = batch.parts
    if name not in batch.streams:
        return torch.zeros_like(parts.row, dtype=torch.bool)
    present = batch.streams[name].mask.flatten(1).any(1)  # (B,)
    return parts.set_clips.any(present)[parts.clip_set]


def chosen_parts(batch: Batch, captions_only: bool) -> Tensor:
    """Return the parts whose answer is right, ``(n,)`` bool: all, or those that are no questions."""
    parts = batch.parts
    chosen = parts.role_is("answer", "chosen")
    if captions_only:
        chosen = chosen & ~parts.is_true([part.is_question for part in parts.items])
    return chosen


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
