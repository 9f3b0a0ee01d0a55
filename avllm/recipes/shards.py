"""Make and read the shards of a recipe that makes data.

A shard is a folder that takes its name when it is whole, so that a kill leaves no half shard. Its
content follows from its tasks alone.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from avllm.recipes.media import EMPTY, MISSING, lacking
from avllm.recipes.rows import Drop, RecipeRow
from avllm.recipes.writer import MEDIA

LACKS = "lacks.json"
"""File of a shard: the paths of media that were not there when it was made."""
JOB = "job"
"""Folder of the output that holds what the work itself needs to go on."""
TASKS = "tasks.jsonl"
ITEMS = "items.jsonl"


@dataclass(frozen=True)
class Shard:
    """The place of a shard in the plan, and the folders of its files.

    Attributes:
        number: from 0.
        start: byte of ``tasks.jsonl`` at which its tasks begin.
        count: tasks.
        output: the folder of the whole work.
    """

    number: int
    start: int
    count: int
    output: Path

    @property
    def name(self) -> str:
        """``shard-00000``."""
        return f"shard-{self.number:05d}"

    @property
    def whole(self) -> Path:
        """The folder when the shard is whole."""
        return self.output / "shards" / self.name

    @property
    def folder(self) -> Path:
        """The folder while it is made; media go in here."""
        return self.output / "shards" / f"{self.name}.partial"

    @property
    def answers(self) -> Path:
        """The folder of text models' answers."""
        return self.output / JOB / "answers"


class MakingJob(Protocol):
    """A dataclass of plain values that makes shards, the same wherever it runs."""

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides what is made, JSON-able."""
        ...

    def plan(self) -> Iterator[dict[str, Any] | Drop]:
        """Yield the tasks, JSON-able, and the drops of what gets no task."""
        ...

    def make(self, tasks: Sequence[dict[str, Any]], shard: Shard) -> Iterator[RecipeRow | Drop]:
        """Make a shard. Media paths of rows are absolute, or relative to ``shard.folder``."""
        ...


def cut_shards(output: Path, size: int) -> Iterator[Shard]:
    """Yield the shards of a plan, each of so many tasks, the last one of the rest."""
    number = 0
    start = 0
    with (output / JOB / TASKS).open("rb") as file:
        while lines := list(islice(file, size)):
            yield Shard(number, start, len(lines), output.resolve())
            number += 1
            start += sum(len(line) for line in lines)


def read_tasks(shard: Shard) -> list[dict[str, Any]]:
    """Return the tasks of a shard."""
    with (shard.output / JOB / TASKS).open("rb") as file:
        file.seek(shard.start)
        return [json.loads(line) for line in islice(file, shard.count)]


def make_shard(job: MakingJob, shard: Shard) -> None:
    """Make a shard whole or not at all."""
    if shard.folder.exists():
        shutil.rmtree(shard.folder)  # of a run that was killed
    shard.folder.mkdir(parents=True)
    lacking_media = []
    with (shard.folder / ITEMS).open("w", encoding="utf-8") as file:
        for item in job.make(read_tasks(shard), shard):
            kind = "row" if isinstance(item, RecipeRow) else "drop"
            file.write(json.dumps({kind: asdict(item)}, ensure_ascii=False) + "\n")
            if isinstance(item, Drop) and item.reason in (MISSING, EMPTY):
                lacking_media.append(item.detail)
        file.flush()
        os.fsync(file.fileno())
    if lacking_media:
        (shard.folder / LACKS).write_text(json.dumps(lacking_media), encoding="utf-8")
    shard.folder.replace(shard.whole)


def reopen_shards(shards: list[Shard]) -> None:
    """Take the names of shards whose lacking media exist now, so that they are made again."""
    for shard in shards:
        path = shard.whole / LACKS
        if not path.is_file():
            continue
        media = json.loads(path.read_text(encoding="utf-8"))
        if any(lacking(medium) is None for medium in media):
            shutil.rmtree(shard.folder, ignore_errors=True)
            shard.whole.replace(shard.folder)


def read_shard(shard: Shard) -> Iterator[RecipeRow | Drop]:
    """Yield the rows and drops of a whole shard; media paths are absolute."""
    with (shard.whole / ITEMS).open(encoding="utf-8") as file:
        for line in file:
            item = json.loads(line)
            if "drop" in item:
                yield Drop(**item["drop"])
                continue
            for message in item["row"]["sample"]["messages"]:
                _make_paths_absolute(message["content"], shard.whole)
            yield RecipeRow(**item["row"])


def _make_paths_absolute(content: list[Any] | str, folder: Path) -> None:
    for part in content:
        if isinstance(part, dict) and part.get("type") in MEDIA:
            kind = part["type"]
            part[kind] = str(folder / part[kind])  # a path that is absolute stays
