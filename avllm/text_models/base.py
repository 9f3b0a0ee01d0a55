"""What a text model is: prompts in, answers out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from avllm.recipes.readers import RecipeError

THOUGHTS = re.compile(r"\A.*?</think>", re.DOTALL)  # many templates write the opening mark into the prompt


class TextModelError(RecipeError):
    """A text model that cannot be reached or used. A job goes on when it is started again: all batches are kept but
    the one that failed."""


@dataclass(frozen=True)
class Prompt:
    """What a text model is asked."""

    user: str
    system: str = ""

    @property
    def messages(self) -> list[dict[str, str]]:
        """In the form of chat templates and of the OpenAI API."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.user}]


@dataclass(frozen=True)
class Answer:
    """A text, or why there is none (``reason`` is one word: ``refused``, ``cut_off``, ``prompt_too_long``)."""

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

    def answer(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """One answer a prompt, in order.

        Raises:
            TextModelError: the model cannot be reached or used.
        """
        ...


def spoken(text: str) -> str:
    """An answer without what a reasoning model thought before it, and without space around it."""
    return THOUGHTS.sub("", text).strip()
