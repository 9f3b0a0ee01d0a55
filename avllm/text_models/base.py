"""Define text models: prompts in, answers out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from avllm.recipes.readers import RecipeError

THOUGHTS = re.compile(r"\A.*?</think>", re.DOTALL)
"""Thoughts before an answer; many templates write the opening mark into the prompt."""


class TextModelError(RecipeError):
    """A text model that cannot be reached or used.

    A job goes on when it is started again: all batches are kept but the one that failed.
    """


@dataclass(frozen=True)
class ModelPrompt:
    """A question to a text model, with a system prompt or without one."""

    user: str
    system: str = ""

    @property
    def messages(self) -> list[dict[str, str]]:
        """The prompt in the form of chat templates and of the OpenAI API."""
        messages = [{"role": "user", "content": self.user}]
        if self.system:
            messages.insert(0, {"role": "system", "content": self.system})
        return messages


@dataclass(frozen=True)
class Answer:
    """A text, or the reason why there is none.

    Attributes:
        text: the answer.
        reason: one word: ``refused``, ``cut_off``, ``prompt_too_long``; "" where there is a text.
        detail: what was seen.
    """

    text: str = ""
    reason: str = ""
    detail: str = ""


class TextModel(Protocol):
    """Answers prompts.

    Attributes:
        identity: all that decides an answer, besides the prompt; JSON-able.
        batch_size: prompts that are best asked at once.
    """

    @property
    def identity(self) -> dict[str, Any]: ...

    @property
    def batch_size(self) -> int: ...

    def answer(self, prompts: Sequence[ModelPrompt]) -> list[Answer]:
        """Return one answer a prompt, in order.

        Raises:
            TextModelError: the model cannot be reached or used.
        """
        ...


def spoken(text: str) -> str:
    """Return an answer without the thoughts of a reasoning model and without space around it."""
    return THOUGHTS.sub("", text).strip()
