"""Conversations as data sets write them -> messages: turns with placeholders (ShareGPT), or questions and answers.

What cannot become a valid chat is a :class:`RowError` with one word to count by; nothing is mended on the way.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from avllm.data.schema import RowError

ROLES = {
    **dict.fromkeys(["human", "user"], "user"),
    **dict.fromkeys(["gpt", "assistant", "chatgpt", "model", "bing", "bard"], "assistant"),
    "system": "system",
}
"""Who speaks, in the names that ShareGPT files use; bing and bard occur in LLaVA-1.5's mixture."""
PLACEHOLDER = re.compile(r"\n?<(image|video|audio)>\n?")
"""With the line break that sets it off from the text: ``<image>\\nWhat is this?``."""

Part = dict[str, Any]
Turn = tuple[str, str]


def chat_messages(turns: Any, media: Mapping[str, Sequence[Part]]) -> list[dict[str, Any]]:
    """Turns with placeholders -> messages with media parts.

    Args:
        turns: the list of a row: ``{"from": "human", "value": text}`` or ``{"role": "user", "content": text}``.
        media: by kind (``image``, ``video``, ``audio``) the content parts; the k-th placeholder of a kind stands for
            the k-th part.

    Raises:
        RowError: ``no_turns``, ``malformed_turn``, ``unknown_role``, ``empty_turn``, ``starts_without_question``,
            ``turns_do_not_alternate``, ``ends_without_answer``, ``placeholder_in_answer`` or ``placeholder_mismatch``.
    """
    said = read_turns(turns)
    _check_order([role for role, _ in said])
    _check_placeholders(said, media)
    waiting = {kind: iter(parts) for kind, parts in media.items()}
    return [{"role": role, "content": list(_content(text, waiting))} for role, text in said]


def question_messages(media: Sequence[Part], pairs: Iterable[Sequence[str]]) -> list[dict[str, Any]]:
    """Questions and their answers -> messages; the media stand in front of the first question.

    Raises:
        RowError: ``no_turns``, ``empty_question`` or ``empty_answer`` (also where a table says ``nan``).
    """
    messages: list[dict[str, Any]] = []
    for question, answer in pairs:
        for name, text in (("question", question), ("answer", answer)):
            if is_blank(text):
                raise RowError(f"empty_{name}", f"{name} {len(messages) // 2 + 1} is {text!r}")
        parts = [] if messages else list(media)
        messages.append({"role": "user", "content": [*parts, _text(question.strip())]})
        messages.append({"role": "assistant", "content": [_text(answer.strip())]})
    if not messages:
        raise RowError("no_turns", "there is no question")
    return messages


def is_blank(text: str) -> bool:
    """Whether a field says nothing; ``nan`` is what tables write for an empty one."""
    return text.strip() in {"", "nan", "NaN"}


def read_turns(turns: Any) -> list[Turn]:
    """(role, text without space around it) of each turn.

    Raises:
        RowError: ``no_turns``, ``malformed_turn``, ``unknown_role`` or ``empty_turn``.
    """
    if not isinstance(turns, list) or not turns:
        raise RowError("no_turns", f"the conversation is {turns!r}; expected a list of turns")
    return [_read_turn(turn, number) for number, turn in enumerate(turns, start=1)]


def _read_turn(turn: Any, number: int) -> Turn:
    who, text = None, None
    if isinstance(turn, dict):
        who, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if not isinstance(who, str) or not isinstance(text, str):
        raise RowError("malformed_turn", f"turn {number} is {str(turn)[:80]}; expected texts in 'from' and 'value'")
    if who.lower() not in ROLES:
        raise RowError("unknown_role", f"turn {number} is by {who!r}; known: {', '.join(ROLES)}")
    if not text.strip():
        raise RowError("empty_turn", f"turn {number}, by {who!r}, is empty")
    return ROLES[who.lower()], text.strip()


def without_leading_answers(turns: Any) -> Any:
    """The turns without the answers that stand in front of the first question; anything but turns is given back."""
    first = 0
    while isinstance(turns, list) and first < len(turns) and _answers(turns[first]):
        first += 1
    return turns[first:] if first else turns


def _answers(turn: Any) -> bool:
    who = turn.get("from", turn.get("role")) if isinstance(turn, dict) else None
    return isinstance(who, str) and ROLES.get(who.lower()) == "assistant"


def _check_order(roles: list[str]) -> None:
    roles = roles[1:] if roles[0] == "system" else roles
    if not roles or roles[0] != "user":
        raise RowError("starts_without_question", f"the first turn is by {roles[0] if roles else 'nobody'}")
    for number, (one, other) in enumerate(pairwise(roles), start=2):
        if {one, other} != {"user", "assistant"}:
            raise RowError("turns_do_not_alternate", f"turn {number} is by {other} behind one by {one}")
    if roles[-1] != "assistant":
        raise RowError("ends_without_answer", f"the last of {len(roles)} turns is a question")


def _check_placeholders(said: Sequence[Turn], media: Mapping[str, Sequence[Part]]) -> None:
    seen: Counter[str] = Counter()
    for number, (role, text) in enumerate(said, start=1):
        found = PLACEHOLDER.findall(text)
        if found and role != "user":
            raise RowError("placeholder_in_answer", f"turn {number}, by the {role}, holds <{found[0]}>")
        seen.update(found)
    given = {kind: len(parts) for kind, parts in media.items() if parts}
    if dict(seen) != given:
        raise RowError("placeholder_mismatch", f"placeholders: {dict(seen) or 'none'}; files: {given or 'none'}")


def _content(text: str, waiting: Mapping[str, Iterator[Part]]) -> Iterator[Part]:
    for place, piece in enumerate(PLACEHOLDER.split(text)):
        if place % 2:
            yield next(waiting[piece])
        elif piece:
            yield _text(piece)


def _text(text: str) -> Part:
    return {"type": "text", "text": text}
