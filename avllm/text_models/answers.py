"""Keep the answers of text models by the hash of (model, prompt), so that none is asked twice.

A folder holds journals, one for each shard that asks, so that many processes may write at once.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from avllm.data.store.append_only import AppendOnly, LockedError
from avllm.text_models.base import Answer, ModelPrompt, TextModel, TextModelError


def answer_key(model: TextModel, prompt: ModelPrompt) -> str:
    """Return the SHA-256 of the model's identity and the prompt."""
    return _key(_identity_text(model), prompt)


def _identity_text(model: TextModel) -> str:
    return json.dumps(model.identity, sort_keys=True, ensure_ascii=False)


def _key(identity: str, prompt: ModelPrompt) -> str:
    messages = json.dumps(prompt.messages, ensure_ascii=False)
    return hashlib.sha256(f"{identity}\n{messages}".encode()).hexdigest()


class Answers:
    """All answers of a folder of journals, in memory.

    Attributes:
        by_key: the answers by :func:`answer_key`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.by_key: dict[str, Answer] = {}
        self._bytes_read: dict[Path, int] = {}

    def refresh(self) -> None:
        """Read what was written since the last time, by this process or another.

        Raises:
            TextModelError: ``no_answer`` in a line.
        """
        for path in sorted(self.folder.glob("*.jsonl")):
            if path.stat().st_size != self._bytes_read.get(path, 0):
                self._read_rest(path)

    def _read_rest(self, path: Path) -> None:
        with path.open("rb") as file:
            file.seek(self._bytes_read.get(path, 0))
            for line in file:
                if not line.endswith(b"\n"):  # being written, or cut off by a kill
                    break
                key, answer = _read_line(line, path)
                self.by_key[key] = answer
                self._bytes_read[path] = self._bytes_read.get(path, 0) + len(line)

    def ask(self, model: TextModel, prompts: Sequence[ModelPrompt], name: str) -> list[Answer]:
        """Return an answer for each prompt; only prompts without one are put to the model.

        Each batch of answers is on the disk before the next is asked for.

        Args:
            model: answers what was not answered before.
            prompts: may repeat.
            name: of the journal that is written; one process at a time may write it.

        Raises:
            TextModelError: the model cannot be reached or used, or another process writes this
                journal (``locked``); answers until then are kept.
        """
        self.refresh()
        identity = _identity_text(model)
        keys = [_key(identity, prompt) for prompt in prompts]
        pending = {
            key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in self.by_key
        }
        if pending:
            with self._journal(name) as journal:
                self._ask(model, pending, journal)
        return [self.by_key[key] for key in keys]

    def _journal(self, name: str) -> AppendOnly:
        try:
            return AppendOnly(self.folder / f"{name}.jsonl")
        except LockedError as error:
            raise TextModelError(str(error), reason="locked") from error

    def _ask(self, model: TextModel, pending: dict[str, ModelPrompt], journal: AppendOnly) -> None:
        keys = list(pending)
        for first in range(0, len(keys), model.batch_size):
            group = keys[first : first + model.batch_size]
            answers = model.answer([pending[key] for key in group])
            answered = dict(zip(group, answers, strict=True))
            journal.append([_row(key, answer) for key, answer in answered.items()])
            self.by_key.update(answered)


def _read_line(line: bytes, path: Path) -> tuple[str, Answer]:
    try:
        row = json.loads(line)
        return row.pop("key"), Answer(**row)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TextModelError(
            f"{path} holds a line that is no answer ({error!r}): {line[:80]!r}; delete the line, "
            "or the file, whose answers are then asked for again",
            reason="no_answer",
        ) from error


def _row(key: str, answer: Answer) -> dict[str, str]:
    """Return the line of an answer; an empty reason and detail are left out."""
    fields = asdict(answer)
    return {"key": key} | {n: value for n, value in fields.items() if value or n == "text"}


@functools.lru_cache(maxsize=4)
def answers_of(folder: Path) -> Answers:
    """Return the answers of a folder, read once a process."""
    return Answers(folder)
