"""What recipes of questions and conversations share: files of splits, rows or drops, listed choices, wordings."""

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
    """Fields of an object inside a row, without space around them; one that is not there is empty.

    Raises:
        RecipeError: it is no object, or a field is no text.
    """
    found = [value.get(field) or "" for field in fields] if isinstance(value, dict) else []
    texts = [text.strip() for text in found if isinstance(text, str)]
    if len(texts) < len(fields):
        raise RecipeError(f"{where}: {str(value)[:80]}; expected texts in {', '.join(fields)}")
    return texts


def named_splits(*patterns: str) -> dict[str, list[str]]:
    """Split -> the paths at which its file may lie: in the patterns ``*`` is train, val or test."""
    return {split: [pattern.replace("*", name) for pattern in patterns] for name, split in SPLITS.items()}


def split_files(source: Path, files: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, Path]]:
    """(split, the first of its files that is there) of each split that has one."""
    for split, names in files.items():
        path = next((source / name for name in names if (source / name).is_file()), None)
        if path is not None:
            yield split, path


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
    """A row of one question about one file; what is None or empty is left out.

    Raises:
        RowError: ``empty_question`` or ``empty_answer``.
    """
    row = {"id": sample_id, "messages": question_messages([media], [(question, answer)])}
    further = {"kind": kind, "choices": choices, "answers": answers, "meta": meta}
    return row | {name: value for name, value in further.items() if value}


def when_question(event: str, key: str | None) -> str:
    """The question when an event takes place, worded by the key; None takes the first wording, for evaluation."""
    return (WHEN[0] if key is None else wording(WHEN, key)).format(event.strip().rstrip("."))


def with_choices(question: str, choices: Sequence[str]) -> str:
    """The question with its choices below it, one a line: ``(A) ...``."""
    listed = (f"({chr(ord('A') + place)}) {choice}" for place, choice in enumerate(choices))
    return "\n".join([question.strip(), *listed])


def chosen(choices: Iterable[Any], place: Any) -> tuple[list[str], str]:
    """The choices as texts, and the right one.

    Raises:
        RowError: ``empty_choice``, or ``answer_out_of_range`` where ``place`` is no index of theirs, from 0.
    """
    texts = ["" if choice is None else str(choice).strip() for choice in choices]
    if any(is_blank(text) for text in texts):
        raise RowError("empty_choice", f"the choices are {texts}")
    if not str(place).isdecimal() or int(place) >= len(texts):
        raise RowError(
            "answer_out_of_range", f"the answer is {place!r}; there are {len(texts)} choices, counted from 0"
        )
    return texts, texts[int(place)]
