"""Find the question that is asked about each clip of a batch, for conditioned connectors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from avllm.adapters.base import Prompt
from avllm.data.collate import Batch, BatchParts
from avllm.errors import UserError


def prompt_of(batch: Batch, table: nn.Module) -> Prompt:
    """Return the question about each of the B clips of a batch; an empty one if nothing is asked.

    Args:
        batch: rows that ask one question each about a clip.
        table: the LLM's input embeddings.

    Raises:
        UserError: two different questions are asked about one copy of a clip.
    """
    parts = batch.parts
    part = part_of_clip(parts, batch)  # (B,)
    places, real = parts.asked.padded()  # (n, A): positions of n questions' tokens, and their mask
    if not len(parts):
        places = part.new_zeros(1, 1)
        real = torch.zeros_like(places, dtype=torch.bool)
    ids = batch.input_ids.flatten()[places].masked_fill(~real, 0)  # (n, A)
    is_asked = part >= 0  # (B,)
    ids = ids[part.clamp(min=0)]  # (B, A)
    mask = real[part.clamp(min=0)] & is_asked[:, None]  # (B, A)
    texts = [parts.items[number].question if number >= 0 else "" for number in part.tolist()]
    return Prompt(table(ids), mask, ids, texts)


def part_of_clip(parts: BatchParts, batch: Batch) -> Tensor:
    """Return the part that asks about each clip, ``(B,)`` long; -1 if none does.

    Several parts may refer to a clip if they ask the same question, with different answers.

    Raises:
        UserError: ``two_questions``: they ask different questions.
    """
    first_of_set: dict[int, int] = {}
    has_clips = (parts.set_clips.sizes() > 0).tolist()  # by set
    for number, clip_set in enumerate(parts.clip_set.tolist()):
        first = first_of_set.setdefault(clip_set, number)
        if has_clips[clip_set] and parts.items[first].question != parts.items[number].question:
            raise _two_questions(parts, first, number)
    part = [-1] * len(batch.clip_row)
    clip_sets = parts.set_clips.owner.tolist()
    clips = parts.set_clips.at.tolist()
    for clip_set, clip in zip(clip_sets, clips, strict=True):
        number = first_of_set[clip_set]
        if part[clip] >= 0 and parts.items[part[clip]].question != parts.items[number].question:
            raise _two_questions(parts, part[clip], number)
        part[clip] = number
    return torch.tensor(part, dtype=torch.long, device=parts.row.device)


def _two_questions(parts: BatchParts, one: int, other: int) -> UserError:
    first, second = parts.items[one], parts.items[other]
    return UserError(
        f"row {second.id!r} asks {second.question!r} about a clip of which row {first.id!r} asks "
        f"{first.question!r}; the connector reads the question, so each needs a copy of the clip: "
        "rows: {type: each_turn}, not pack: media",
        reason="two_questions",
    )
