"""Hold a chat as the template wrote it: text with marks for media, and the places of its turns."""

from __future__ import annotations

from dataclasses import dataclass

MARK = "\u0001"  # replaces a media part while the template is rendered; text must not contain it
PROBE = "\u0002"  # replaces a whole turn, to find where the template puts it

Range = tuple[int, int]
"""Index of the first character and of the one after the last."""


@dataclass(frozen=True)
class Turn:
    """A user's message and the answer to it, in a rendered chat.

    Attributes:
        question: the text of the user's message.
        asked: its ranges in the chat; empty if the template changes it.
        target: the answer's text; empty in a prompt.
        trained: range of the answer in the chat, with its end marker; None in a prompt, and where
            the template writes the turn otherwise when more follow.
        media: the number of media parts in the chat up to this turn.
    """

    question: str
    asked: tuple[Range, ...]
    target: str
    trained: Range | None
    media: int


@dataclass(frozen=True)
class Rendered:
    """A chat as text, written by the template."""

    text: str
    turns: tuple[Turn, ...]
