"""Judge the texts that a text model has written."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from avllm.errors import one_line
from avllm.recipes.readers import RecipeError
from avllm.text_models.base import Answer, ModelPrompt
from avllm.yaml_files import parse_yaml

PROMPT_FIELDS = {
    "system",
    "caption",
    "rewritings",
    "no_sound",
    "refusals",
    "dates",
    "urls",
    "devices",
    "no_names",
}
"""Fields of a file of prompts."""
REFUSALS = (
    "failure",
    "i'm sorry",
    "i am sorry",
    "i cannot",
    "i can't",
    "as an ai",
    "unable to",
)
"""Beginnings of answers that are none."""


def rewriting_fault(answer: Answer, others: Iterable[str], events: Sequence[str]) -> str | None:
    """Return the fault of a rewritten caption in one word, None when it can be used.

    Args:
        answer: of the text model.
        others: captions that it must differ from.
        events: captions of the events that it must name: at least half of each one's words.
    """
    text = answer.text.strip()
    if answer.reason:
        return answer.reason
    if not text:
        return "empty"
    if "\n" in text:
        return "several_lines"
    if text.lower().startswith(REFUSALS):
        return "refused"
    if bare(text) in {bare(other) for other in others}:
        return "same_as_caption"
    if any(not names_event(text, event) for event in events):
        return "other_sounds"
    return None


def names_event(text: str, event: str) -> bool:
    """Return whether a text has at least half of the longer words of an event's caption."""
    event_stems = stems(event)
    missing = event_stems - stems(text)
    return 2 * len(missing) <= len(event_stems)


def bare(text: str) -> str:
    """Return the letters and numbers of a text, in lower case."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def stems(text: str) -> set[str]:
    """Return the beginnings of a text's longer words: `barks` and `barking` have the same."""
    return {word[:4] for word in bare(text).split() if len(word) > 3}


@dataclass(frozen=True)
class Fault:
    """The reason why a text cannot be used, in one word, and what was seen."""

    reason: str
    detail: str


@dataclass(frozen=True)
class CaptionJudge:
    """The content of a file of prompts: prompts, and the words by which answers are judged."""

    data: dict[str, Any]

    def prompt(self, name: str, number: int | None = None, **fields: str) -> ModelPrompt:
        """Return a prompt with its fields filled in; braces in a description are no fields."""
        text: str = self.data[name] if number is None else self.data[name][number]
        for key, value in fields.items():
            text = text.replace("{" + key + "}", value)
        return ModelPrompt(text, self.data["system"])

    def fault(self, answer: Answer, words: tuple[int, int], other: str = "") -> Fault | None:
        """Return the fault of an answer, None when it can be used.

        Args:
            answer: of the text model.
            words: the fewest and the most words.
            other: a caption that it must differ from.
        """
        if answer.reason:
            return Fault(answer.reason, answer.detail)
        text = answer.text
        beginning = text.lower().lstrip("\"'* ")
        count = len(text.split())
        fewest, most = words
        faults = {
            "empty": not text,
            "no_sound_event": beginning.startswith(tuple(self.data["no_sound"])),
            "refused": beginning.startswith(tuple(self.data["refusals"])),
            "several_lines": "\n" in text,
            "too_short": count < fewest,
            "too_long": count > most,
            "url": self._matches("urls", text),
            "date": self._matches("dates", text),
            "device": self._matches("devices", text),
            "name": bool(self.names(text)),
            "same_as_caption": bool(other) and bare(text) == bare(other),
        }
        reasons = [reason for reason, applies in faults.items() if applies]
        return Fault(reasons[0], text) if reasons else None

    def _matches(self, name: str, text: str) -> bool:
        return any(re.search(pattern, text, re.IGNORECASE) for pattern in self.data[name])

    def names(self, text: str) -> list[str]:
        """Return the words that seem to be names.

        They have a capital, do not begin a sentence, and are not in the list ``no_names``.
        """
        inner = re.findall(r"(?<![.!?:\"])(?<!^)\s+[\"'(]?([A-Z][\w'-]*)", text)
        return [word for word in inner if word.removesuffix("'s") not in self.data["no_names"]]


def judge_of(text: str) -> CaptionJudge:
    """Return the content of a file of prompts.

    Raises:
        RecipeError: no YAML, or a field is missing or unknown.
    """
    try:
        data = parse_yaml(text)
    except yaml.YAMLError as error:
        raise RecipeError(
            f"the file of prompts is no YAML: {one_line(error)}", reason="bad_prompts"
        ) from error
    if not isinstance(data, dict):
        raise RecipeError(
            f"the file of prompts is no mapping; expected {sorted(PROMPT_FIELDS)}",
            reason="bad_prompts",
        )
    differing = sorted(PROMPT_FIELDS ^ set(data))
    if differing:
        raise RecipeError(
            f"the file of prompts: {', '.join(differing)} missing or unknown; "
            f"expected {sorted(PROMPT_FIELDS)}",
            reason="bad_prompts",
        )
    return CaptionJudge(data)
