"""Read split files, choices and wordings, for recipes of questions and conversations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from avllm.data.schema import RowError
from avllm.recipes.captions import wording
from avllm.recipes.conversations import is_blank, question_messages
from avllm.recipes.readers import SPLITS, RecipeError

WHEN = (
    "When does this happen in the video: {}? Give its start and end in seconds.",
    "From which second to which can this be seen or heard: {}?",
    "Find this in the video, and say at which seconds it begins and ends: {}.",
    "During which seconds of the video does this happen: {}?",
)


def texts_of(value: Any, where: str, *fields: str) -> list[str]:
    """Return fields of an object inside a row, without space around them; an absent one is empty.

    Raises:
        RecipeError: it is no object, or a field is no text.
    """
    values = []
    if isinstance(value, dict):
        values = [value.get(field) or "" for field in fields]
    texts = [text.strip() for text in values if isinstance(text, str)]
    if len(texts) < len(fields):
        raise RecipeError(
            f"{where}: {str(value)[:80]}; expected texts in {', '.join(fields)}",
            reason="no_texts",
        )
    return texts


def named_splits(*patterns: str) -> dict[str, list[str]]:
    """Return, by split, the paths at which its file may lie.

    Args:
        patterns: paths in which ``*`` is train, val or test.
    """
    paths = {}
    for name, split in SPLITS.items():
        paths[split] = [pattern.replace("*", name) for pattern in patterns]
    return paths


def split_files(source: Path, files: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, Path]]:
    """Yield (split, the first of its files that exists) of each split that has one."""
    for split, names in files.items():
        paths = [source / name for name in names if (source / name).is_file()]
        if paths:
            yield split, paths[0]


def question_sample(
    sample_id: str,
    media: dict[str, Any],
    question: str,
    answer: str,
    *,
    kind: str | None = None,
    choices: Sequence[str] | None = None,
    answers: Sequence[str] | None = None,
    meta: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return a row of one question about one file; what is None or empty is left out.

    Raises:
        RowError: ``empty_question`` or ``empty_answer``.
    """
    row = {"id": sample_id, "messages": question_messages([media], [(question, answer)])}
    further = {"kind": kind, "choices": choices, "answers": answers, "meta": meta}
    return row | {name: value for name, value in further.items() if value}


def when_question(event: str, key: str | None) -> str:
    """Return the question when an event takes place, worded by the key.

    Args:
        event: a description of the event.
        key: chooses the wording; None takes the first one, for evaluation.
    """
    question = WHEN[0] if key is None else wording(WHEN, key)
    return question.format(event.strip().rstrip("."))


def with_choices(question: str, choices: Sequence[str]) -> str:
    """Return the question with its choices below it, one a line: ``(A) ...``."""
    lines = [question.strip()]
    for number, choice in enumerate(choices):
        letter = chr(ord("A") + number)
        lines.append(f"({letter}) {choice}")
    return "\n".join(lines)


def chosen(choices: Iterable[Any], place: Any) -> tuple[list[str], str]:
    """Return the choices as texts, and the right one.

    Raises:
        RowError: ``empty_choice``, or ``answer_out_of_range`` where ``place`` is no index of
            theirs, from 0.
    """
    texts = ["" if choice is None else str(choice).strip() for choice in choices]
    if any(is_blank(text) for text in texts):
        raise RowError("empty_choice", f"the choices are {texts}")
    if not str(place).isdecimal() or int(place) >= len(texts):
        raise RowError(
            "answer_out_of_range",
            f"the answer is {place!r}; there are {len(texts)} choices, counted from 0",
        )
    return texts, texts[int(place)]
