"""Answers of text models, kept by the hash of (model, prompt): a second run asks nothing that was answered before.

A folder of journals, one for each shard that asks, so that many processes may write into it at once.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from avllm.data.store.append_only import AppendOnly, LockedError
from avllm.text_models.base import Answer, Prompt, TextModel, TextModelError


def answer_key(model: TextModel, prompt: Prompt) -> str:
    """SHA-256 of the model's identity and the prompt."""
    return _key(_text(model), prompt)


def _text(model: TextModel) -> str:
    return json.dumps(model.identity, sort_keys=True, ensure_ascii=False)


def _key(model: str, prompt: Prompt) -> str:
    return hashlib.sha256(f"{model}\n{json.dumps(prompt.messages, ensure_ascii=False)}".encode()).hexdigest()


class Answers:
    """All answers of a folder of journals, in memory.

    Attributes:
        known: key -> answer.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known: dict[str, Answer] = {}
        self._read: dict[Path, int] = {}

    def refresh(self) -> None:
        """Read what was written since the last time, by this process or another.

        Raises:
            TextModelError: a line is no answer.
        """
        for path in sorted(self.folder.glob("*.jsonl")):
            if path.stat().st_size == self._read.get(path, 0):
                continue
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                for line in file:
                    if not line.endswith(b"\n"):  # being written, or cut off by a kill
                        break
                    key, answer = _kept(line, path)
                    self.known[key] = answer
                    self._read[path] = self._read.get(path, 0) + len(line)

    def ask(self, model: TextModel, prompts: Sequence[Prompt], name: str) -> list[Answer]:
        """An answer for each prompt; only what is not known is asked, and each batch is on the disk before the next.

        Args:
            name: of the journal that is written; one process at a time may write it.

        Raises:
            TextModelError: the model cannot be reached or used, or another process writes this journal; what was
                answered until then is kept.
        """
        self.refresh()
        text = _text(model)
        keys = [_key(text, prompt) for prompt in prompts]
        pending = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in self.known}
        if pending:
            with self._journal(name) as journal:
                self._ask(model, pending, journal)
        return [self.known[key] for key in keys]

    def _journal(self, name: str) -> AppendOnly:
        try:
            return AppendOnly(self.folder / f"{name}.jsonl")
        except LockedError as error:
            raise TextModelError(str(error)) from error

    def _ask(self, model: TextModel, pending: dict[str, Prompt], journal: AppendOnly) -> None:
        keys = list(pending)
        for first in range(0, len(keys), model.batch_size):
            group = keys[first : first + model.batch_size]
            answers = model.answer([pending[key] for key in group])
            journal.append([_row(key, answer) for key, answer in zip(group, answers, strict=True)])
            self.known.update(zip(group, answers, strict=True))


def _kept(line: bytes, path: Path) -> tuple[str, Answer]:
    try:
        row = json.loads(line)
        return row.pop("key"), Answer(**row)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TextModelError(
            f"{path} holds a line that is no answer ({error!r}): {line[:80]!r}; delete the line, or the file, whose "
            "answers are then asked for again"
        ) from error


def _row(key: str, answer: Answer) -> dict[str, str]:
    return {"key": key, **{name: value for name, value in asdict(answer).items() if value or name == "text"}}


@functools.lru_cache(maxsize=4)
def answers_of(folder: Path) -> Answers:
    """The answers of a folder, read once a process."""
    return Answers(folder)
