"""Answer by rules: for tests and plain edits."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from avllm.text_models.base import Answer, ModelPrompt


class RuleModel:
    r"""Answers by the first rule whose pattern occurs in the prompt.

    Args:
        rules: (regular expression, answer); the answer may name groups: ``\1``.
        otherwise: the answer when no rule fits.
    """

    batch_size = 64

    def __init__(self, rules: Sequence[tuple[str, str]], otherwise: str = "") -> None:
        self.rules = [(re.compile(pattern, re.DOTALL), template) for pattern, template in rules]
        for pattern, template in self.rules:
            pattern.sub(template, "")  # refuses now an answer with a group that its pattern lacks
        self.otherwise = otherwise

    @property
    def identity(self) -> dict[str, Any]:
        """The rules themselves."""
        rules = [[pattern.pattern, template] for pattern, template in self.rules]
        return {"type": "rules", "rules": rules, "otherwise": self.otherwise}

    def answer(self, prompts: Sequence[ModelPrompt]) -> list[Answer]:
        """Answer each prompt, see :class:`avllm.text_models.base.TextModel`."""
        return [Answer(self._answer(prompt.user)) for prompt in prompts]

    def _answer(self, text: str) -> str:
        for pattern, template in self.rules:
            match = pattern.search(text)
            if match is not None:
                return match.expand(template)
        return self.otherwise
