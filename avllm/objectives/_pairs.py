"""Pair a clip's streams with each other or with its text, and draw mismatched pairs."""

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
"""Streams by the short name of their combination."""


@dataclass(frozen=True)
class Pair:
    """Name the two sides of a pair.

    Attributes:
        left: the streams whose tokens are pooled for the first side.
        right: the streams of the second side; empty where it is the text.
    """

    left: tuple[str, ...]
    right: tuple[str, ...] = ()

    @property
    def streams(self) -> tuple[str, ...]:
        """Return all streams that a row must have."""
        return (*self.left, *self.right)


def parse_pair(name: str) -> Pair:
    """Parse the name of a pair: ``audio-text``, ``speech+video-text``, ``video-audio``.

    ``av`` is short for ``video+audio``.

    Raises:
        ValueError: the name has not two sides, repeats a stream, or has ``text`` elsewhere than
            alone on the second side.
    """
    sides = [JOINS.get(side, tuple(side.split("+"))) for side in name.split("-")]
    streams = [stream for side in sides for stream in side]
    with_text = sides[-1] == ("text",)
    if with_text:
        streams.remove("text")
    repeated = len(set(streams)) < len(streams)
    if len(sides) != 2 or not all(streams) or repeated or "text" in streams:
        raise ValueError(
            f"objectives: {name!r} is no pair; expected two sides, of streams or, the second, "
            "of the text: audio-text, speech+video-text, video-audio"
        )
    return Pair(sides[0], () if with_text else sides[1])


def check_pairs(names: Sequence[str], model: Any) -> list[str]:
    """Return pairs after a check that each is named once, of streams that can be compared.

    Rows are counted by the encoders' streams, and what comes out of the connector under the same
    name is compared.

    Raises:
        ValueError: no pair, a name that is none, a stream that no encoder of the model makes, or
            one that does not come out of the connector.
    """
    if not names:
        raise ValueError(
            f"objectives: no stream of the encoders ({sorted(model.encoders)}) comes out of the "
            f"connector, which gives {model.connector.out_streams}; there is nothing to compare "
            "with the text. Leave this objective out, or `branch` a stream before it is consumed"
        )
    for name in names:
        unknown = [stream for stream in parse_pair(name).streams if stream not in model.encoders]
        if unknown:
            raise ValueError(
                f"objectives: pair {name!r} reads stream {unknown[0]!r}; expected some of "
                f"{sorted(model.encoders)}, the encoders' streams, by which rows are counted"
            )
        consumed = [s for s in parse_pair(name).streams if s not in model.connector.out_streams]
        if consumed:
            raise ValueError(
                f"objectives: pair {name!r} reads stream {consumed[0]!r}, which the connector "
                f"consumes; it gives {model.connector.out_streams}. Name another pair, or leave "
                "this objective out: it would teach nothing"
            )
    if len(set(names)) < len(names):
        raise ValueError(f"objectives: pairs are {list(names)}; expected each once")
    return list(names)


def default_pairs(model: Any) -> list[str]:
    """Return the pair of each stream with the text and, last, that of all streams together.

    Streams that the connector consumes are left out.
    """
    reaching = set(model.encoders) & set(model.connector.out_streams)
    streams = sorted(reaching, reverse=True)
    pairs = [f"{stream}-text" for stream in streams]
    if len(streams) > 1:
        together = "av" if streams == ["video", "audio"] else "+".join(streams)
        pairs.append(f"{together}-text")
    return pairs


def pool_clip_sets(
    streams: dict[str, Tokens], names: tuple[str, ...], sets: Places
) -> tuple[Tensor, Tensor]:
    """Average the real tokens of the named streams over the clips of each set.

    Each stream is averaged by itself first, so that all weigh the same.

    Args:
        streams: connector output, Tokens with x ``(B, T, P, D)``.
        sets: the clips of each of S sets.

    Returns:
        ``(S, D)``, zero where nothing is real, and ``(S,)`` bool, True where **every** named stream
        is present.
    """
    means: list[Tensor] = []
    present: list[Tensor] = []
    for name in names:
        x, mask = streams[name].flat()  # (B, N, D), (B, N)
        total = sets.sums((x * mask[..., None]).sum(1))  # (S, D)
        count = sets.sums(mask.sum(1).to(x.dtype))  # (S,)
        means.append(total / count.clamp(min=1)[:, None])
        present.append(count > 0)
    return torch.stack(means).mean(0), torch.stack(present).all(0)


def tokens_by_clip_set(streams: dict[str, Tokens], sets: Places) -> tuple[Tensor, Tensor]:
    """Return all connector tokens of the clips of each set.

    Args:
        streams: connector output of B clips.
        sets: the clips of each of S sets.

    Returns:
        the tokens ``(S, M, D)`` and which are real, ``(S, M)`` bool.
    """
    flat = [tokens.flat() for tokens in streams.values()]
    x = torch.cat([features for features, _ in flat], 1)  # (B, N, D)
    mask = torch.cat([real for _, real in flat], 1)  # (B, N)
    clips, is_clip = sets.padded()  # (S, C)
    real = mask[clips] & is_clip[..., None]  # (S, C, N)
    return x[clips].flatten(1, 2), real.flatten(1, 2)


def text_id(text: str) -> int:
    """Return a 63-bit number that equal texts share on every process and in every run."""
    digest = hashlib.blake2b(text.strip().encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def text_ids(parts: BatchParts, same: str = "text") -> Tensor:
    """Return the id of each part's text, ``(n,)`` long.

    Args:
        parts: the n parts of a batch.
        same: ``text``: the text is the part's answer. ``kind``: it is the part's kind, and the
            answer only where a part has none.
    """
    ids: list[int] = []
    for part in parts.items:
        by_kind = same == "kind" and part.kind is not None
        ids.append(text_id(f"kind {part.kind}" if by_kind else part.target))
    return torch.tensor(ids, dtype=torch.long, device=parts.row.device)


def parts_with(batch: Batch, pair: str) -> Tensor:
    """Return the parts that have both sides of a pair, ``(n,)`` bool.

    Streams count by the encoders' masks, which are there before anything is computed.
    """
    sides = parse_pair(pair)
    if sides.right:
        chosen = torch.ones_like(batch.parts.row, dtype=torch.bool)
    else:
        chosen = batch.parts.has_target
    for name in sides.streams:
        chosen = chosen & has_stream(batch, name)
    return chosen


def has_stream(batch: Batch, name: str) -> Tensor:
    """Return the parts of which a clip has the stream, ``(n,)`` bool."""
    parts = batch.parts
    if name not in batch.streams:
        return torch.zeros_like(parts.row, dtype=torch.bool)
    present = batch.streams[name].mask.flatten(1).any(1)  # (B,)
    return parts.set_clips.any(present)[parts.clip_set]


def chosen_parts(batch: Batch, captions_only: bool) -> Tensor:
    """Return the parts whose answer is right, ``(n,)`` bool.

    Args:
        captions_only: leave out questions.
    """
    parts = batch.parts
    chosen = parts.role_is("answer", "chosen")
    if captions_only:
        chosen = chosen & ~parts.is_true([part.is_question for part in parts.items])
    return chosen


def sample_negatives(
    similarity: Tensor, same: Tensor, scale: float = 10.0
) -> tuple[Tensor, Tensor]:
    """Draw a negative key for each row, with a probability that grows with similarity.

    Args:
        similarity: ``(n, N)`` cosines of rows and keys.
        same: ``(n, N)`` bool, keys that match the row and may not be drawn.
        scale: inverse temperature of the draw.

    Returns:
        ``(n,)`` long, the drawn key, and ``(n,)`` bool, False where every key matches the row and
        the drawn one means nothing.
    """
    possible = ~same.all(1)
    logits = (scale * similarity).masked_fill(same, -torch.inf)
    logits = torch.where(possible[:, None], logits, torch.zeros_like(logits))
    if not len(logits):  # torch.multinomial refuses an empty batch
        return possible.long(), possible
    drawn = torch.multinomial(logits.softmax(1), 1).squeeze(1)
    return drawn, possible


def matching_loss(positive: Tensor, negatives: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the binary cross-entropy of matching and mismatched pairs.

    It is averaged over the pairs of each row and summed over rows.

    Args:
        positive: ``(n,)`` logits of matching pairs.
        negatives: logits ``(n,)`` of mismatched pairs, and bool ``(n,)``, which of them exist.
    """
    total = F.softplus(-positive)
    count = torch.ones_like(positive)
    for logits, exists in negatives:
        total = total + F.softplus(logits) * exists
        count = count + exists
    return (total / count).sum()
