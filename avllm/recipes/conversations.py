"""Turn the conversations of data sets into chat messages.

A set writes turns with placeholders (ShareGPT), or questions and answers. A conversation that
cannot become a valid chat is a :class:`RowError`, with one word to count by; nothing is repaired.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from avllm.data.schema import RowError

ROLES = {
    **dict.fromkeys(["human", "user"], "user"),
    **dict.fromkeys(["gpt", "assistant", "chatgpt", "model", "bing", "bard"], "assistant"),
    "system": "system",
}
"""Roles by the names that ShareGPT files use; bing and bard occur in LLaVA-1.5's mixture."""
PLACEHOLDER = re.compile(r"\n?<(image|video|audio)>\n?")
"""A placeholder with the line breaks around it: ``<image>\\nWhat is this?``."""

Part = dict[str, Any]


@dataclass(frozen=True)
class Utterance:
    """One speaker's text in a conversation: ``role`` is system, user or assistant."""

    role: str
    text: str


def chat_messages(turns: Any, media: Mapping[str, Sequence[Part]]) -> list[dict[str, Any]]:
    """Return the messages of turns with placeholders, media parts in the placeholders' place.

    Args:
        turns: the list of a row: ``{"from": "human", "value": text}`` or
            ``{"role": "user", "content": text}``.
        media: by kind (``image``, ``video``, ``audio``) the content parts; the k-th placeholder of
            a kind stands for the k-th part.

    Raises:
        RowError: ``no_turns``, ``malformed_turn``, ``unknown_role``, ``empty_turn``,
            ``starts_without_question``, ``turns_do_not_alternate``, ``ends_without_answer``,
            ``placeholder_in_answer`` or ``placeholder_mismatch``.
    """
    conversation = read_turns(turns)
    _check_order([turn.role for turn in conversation])
    _check_placeholders(conversation, media)
    waiting = {kind: iter(parts) for kind, parts in media.items()}
    return [
        {"role": turn.role, "content": list(_content(turn.text, waiting))} for turn in conversation
    ]


def question_messages(
    media: Sequence[Part], pairs: Iterable[Sequence[str]]
) -> list[dict[str, Any]]:
    """Return the messages of questions and their answers; the media precede the first question.

    Raises:
        RowError: ``no_turns``, ``empty_question`` or ``empty_answer`` (also where a table says
            ``nan``).
    """
    messages: list[dict[str, Any]] = []
    for number, (question, answer) in enumerate(pairs, start=1):
        for name, text in (("question", question), ("answer", answer)):
            if is_blank(text):
                raise RowError(f"empty_{name}", f"{name} {number} is {text!r}")
        content = [_text(question.strip())]
        if number == 1:
            content = [*media, *content]
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": [_text(answer.strip())]})
    if not messages:
        raise RowError("no_turns", "there is no question")
    return messages


def is_blank(text: str) -> bool:
    """Return whether a field is empty; tables write ``nan`` for an empty one."""
    return text.strip() in {"", "nan", "NaN"}


def read_turns(turns: Any) -> list[Utterance]:
    """Return the turns of a conversation, their texts without space around them.

    Raises:
        RowError: ``no_turns``, ``malformed_turn``, ``unknown_role`` or ``empty_turn``.
    """
    if not isinstance(turns, list) or not turns:
        raise RowError("no_turns", f"the conversation is {turns!r}; expected a list of turns")
    return [_read_turn(turn, number) for number, turn in enumerate(turns, start=1)]


def _read_turn(turn: Any, number: int) -> Utterance:
    speaker = _speaker(turn)
    text = None
    if isinstance(turn, dict):
        text = turn.get("value", turn.get("content"))
    if not isinstance(speaker, str) or not isinstance(text, str):
        raise RowError(
            "malformed_turn",
            f"turn {number} is {str(turn)[:80]}; expected texts in 'from' and 'value'",
        )
    if speaker.lower() not in ROLES:
        raise RowError(
            "unknown_role", f"turn {number} is by {speaker!r}; expected one of {', '.join(ROLES)}"
        )
    if not text.strip():
        raise RowError("empty_turn", f"turn {number}, by {speaker!r}, is empty")
    return Utterance(ROLES[speaker.lower()], text.strip())


def _speaker(turn: Any) -> Any:
    if not isinstance(turn, dict):
        return None
    return turn.get("from", turn.get("role"))


def without_leading_answers(turns: Any) -> Any:
    """Return the turns from the first that is no answer on; anything but turns is given back."""
    if not isinstance(turns, list):
        return turns
    first = 0
    while first < len(turns) and _is_answer(turns[first]):
        first += 1
    return turns[first:] if first else turns


def _is_answer(turn: Any) -> bool:
    speaker = _speaker(turn)
    return isinstance(speaker, str) and ROLES.get(speaker.lower()) == "assistant"


def _check_order(roles: list[str]) -> None:
    if roles[0] == "system":
        roles = roles[1:]
    if not roles:
        raise RowError("starts_without_question", "there is a system prompt and no question")
    if roles[0] != "user":
        raise RowError("starts_without_question", f"the first turn is by {roles[0]}")
    for number, (role, next_role) in enumerate(pairwise(roles), start=2):
        if {role, next_role} != {"user", "assistant"}:
            raise RowError(
                "turns_do_not_alternate", f"turn {number} is by {next_role} and follows {role}"
            )
    if roles[-1] != "assistant":
        raise RowError("ends_without_answer", f"the last of {len(roles)} turns is a question")


def _check_placeholders(turns: Sequence[Utterance], media: Mapping[str, Sequence[Part]]) -> None:
    counts: Counter[str] = Counter()
    for number, turn in enumerate(turns, start=1):
        placeholders = PLACEHOLDER.findall(turn.text)
        if placeholders and turn.role != "user":
            raise RowError(
                "placeholder_in_answer",
                f"turn {number}, by the {turn.role}, holds <{placeholders[0]}>",
            )
        counts.update(placeholders)
    files = {kind: len(parts) for kind, parts in media.items() if parts}
    if dict(counts) != files:
        raise RowError(
            "placeholder_mismatch",
            f"placeholders: {dict(counts) or 'none'}; files: {files or 'none'}",
        )


def _content(text: str, waiting: Mapping[str, Iterator[Part]]) -> Iterator[Part]:
    for place, piece in enumerate(PLACEHOLDER.split(text)):
        if (
            place % 2
        ):  # a placeholder's kind: the pattern has one group, so every second piece is one
            yield next(waiting[piece])
        elif piece:
            yield _text(piece)


def _text(text: str) -> Part:
    return {"type": "text", "text": text}
