"""Make a row from a tokenized chat: turns become parts, and answers that are trained get labels."""

from __future__ import annotations

import torch
from torch import Tensor

from avllm.data.row import IGNORE, Part, Row
from avllm.data.schema import RowError, Sample
from avllm.models.rows.chat_tokens import Tokenized
from avllm.models.rows.rendered import Rendered
from avllm.tokens import EncoderInput


def check_answers(sample: Sample) -> None:
    """Refuse a row for training whose last turn is no answer, or one of whose answers is empty.

    Raises:
        RowError: ``empty_answer``.
    """
    last = len(sample.messages) - 1
    for number, message in enumerate(sample.messages):
        is_answer = message.role == "assistant"
        if (is_answer or number == last) and not (is_answer and message.text.strip()):
            raise RowError(
                "empty_answer",
                f"turn {number} is no answer or an empty one; training needs a text",
            )


def check_length(tokens: Tokenized, longest: int, *, is_prompt: bool) -> None:
    """Refuse a row of more tokens than the longest row may have.

    Raises:
        RowError: ``too_long``.
    """
    if len(tokens.ids) > longest:
        advice = (
            "answers are never cut. Raise data.max_length, take a shorter clip, fewer frames or "
            "queries"
        )
        if is_prompt:
            advice = (
                "questions are never cut. Give shorter or fewer files and texts, or fewer turns "
                "(in Python, processor.max_length may be raised)"
            )
        raise RowError(
            "too_long", f"{len(tokens.ids)} tokens; the longest row is {longest} and {advice}"
        )


def row_of(
    sample: Sample,
    chat: Rendered,
    tokens: Tokenized,
    clips: list[dict[str, EncoderInput]],
    is_media: Tensor,
    *,
    last_only: bool = False,
    is_prompt: bool = False,
) -> Row:
    """Make the row of a sample.

    Args:
        sample: the sample.
        chat: its messages, rendered.
        tokens: its messages, tokenized.
        clips: its media parts, prepared.
        is_media: ``(L,)`` bool, True at placeholders.
        last_only: the last turn alone is a part and has labels.
        is_prompt: the row ends where the answer to its only part begins; earlier answers have
            labels.
    """
    parts = []
    for turn, asked, trained in zip(chat.turns, tokens.asked, tokens.trained, strict=True):
        if turn.trained is None and not is_prompt:  # written otherwise than after its prompt
            continue
        clips_before = tuple(range(turn.media))
        parts.append(
            Part(
                sample.id,
                sample.kind,
                "answer",
                turn.question,
                turn.target,
                asked,
                trained,
                clips_before,
            )
        )
    if last_only:
        parts = parts[-1:]
    labels = torch.full_like(tokens.ids, IGNORE)  # (L,)
    for part in parts:
        labels[part.trained] = tokens.ids[part.trained]
    if is_prompt:
        parts = parts[-1:]
    return Row(
        sample.id,
        tokens.ids,
        labels,
        clips,
        is_media,
        sample.source,
        tuple(parts),
        clip_places=tokens.clip_places,
    )
