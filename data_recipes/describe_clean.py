"""Turn raw descriptions of sounds into clean captions, and rewrite them in terms of acoustics.

    python data_recipes/describe_clean.py SOURCE --output DIR --file sounds.csv --model MODEL
    python data_recipes/describe_clean.py SOURCE --output DIR --model MODEL --rewritings 4

MODEL is, for example, http://127.0.0.1:8000/v1#Qwen3-8B or hf:Qwen/Qwen3-4B-Instruct-2507.

SOURCE is a folder with a manifest of any recipe (the answer is the raw description), or a table or
JSON lines with a file and a description a row. Three steps: rules tidy the description and drop
what is hopeless; a text model turns it into one sentence, or says that it cannot; rules drop
sentences that still hold names, dates, addresses or talk of devices, are too short or too long.
Then each caption can be rewritten several times.

What is left out is in dropped.jsonl, with its reason. Answers are kept by their hash: a second
run asks only what is new. The prompts and the words to judge by are data:
prompts/describe_clean.yaml, or a file of your own.

Procedures: X. Mei et al., WavCaps (arXiv 2303.17395), the three-stage pipeline of pre-processing,
transformation by a large language model, post-processing; S. Ghosh et al., ReCLAP (arXiv
2409.09213), captions rewritten by a language model to describe each sound by its acoustic
characteristics, several rewritings a caption. The prompts are our own.
"""

from __future__ import annotations

import functools
import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from avllm.data.manifest import describe
from avllm.data.schema import Sample, TextPart
from avllm.recipes import frame as recipe
from avllm.recipes import making
from avllm.recipes.captioned import file_digest
from avllm.recipes.frame import (
    Dataset,
    Drop,
    RecipeError,
    RecipeRow,
    Record,
    caption_messages,
    read_csv,
    read_jsonl,
)
from avllm.recipes.media import VIDEO_FILES, lacking
from avllm.text_models.answers import answers_of
from avllm.text_models.base import Answer, ModelPrompt
from avllm.text_models.judging import CaptionJudge, Fault, judge_of
from avllm.text_models.load import load_text_model

ABOUT = Dataset(
    title="Clean captions (made of raw descriptions)",
    licence="that of the descriptions; each row names it where the source does",
    size="a row a description, and one a rewriting",
    where="any folder with a manifest or a table of files and descriptions",
    layout="*.jsonl | *.csv | *.tsv  a manifest, or rows of a file and a description",
    citation="WavCaps, arXiv 2303.17395; ReCLAP, arXiv 2409.09213",
    command="python data_recipes/describe_clean.py SOURCE --output DIR --model MODEL --rewritings "
    "4",
)
PROMPTS = Path(__file__).parent / "prompts" / "describe_clean.yaml"
MARKUP = re.compile(r"<[^>]*>|https?:\S+|www\.\S+|\S+@\S+\.\S+|[#*_|~^]+")


@dataclass(frozen=True)
class DescribeClean:
    """The job; see `rows` for the options. ``prompts`` is the text of the file of prompts."""

    table: Path
    text: str
    media: str
    model: str
    prompts: str
    rewritings: int
    clean: bool
    words: tuple[int, int]
    longest_text: int
    shortest_clip: float
    split: str
    answers: Path | None
    name: str = "clean"
    source: str = "describe_clean"

    @property
    def settings(self) -> dict[str, Any]:
        """All options, the table's hash, and the text model's identity in place of its name."""
        identity = load_text_model(self.model).identity
        settings = making.settings_of(self, self.table)
        return settings | {"answers": None, "model": None, "asked": identity}

    @functools.cached_property
    def judge(self) -> CaptionJudge:
        """The prompts and the words to judge by."""
        return judge_of(self.prompts)

    def plan(self) -> Iterator[dict[str, Any] | Drop]:
        """Yield one task a description that the rules let pass."""
        fields = (self.media, *self.text.split(","))
        for number, record in enumerate(_records(self.table, fields)):
            try:
                task = self._task(record, number)
            except RecipeError as error:
                yield Drop("malformed_row", record.where, str(error))
                continue
            fault = self._fault_of_task(task)
            if fault is None:
                yield task
            else:
                yield Drop(fault.reason, record.where, fault.detail)

    def _task(self, record: Record, number: int) -> dict[str, Any]:
        """Return id, text, media part and licence of a row of a manifest or a table."""
        if record.problem:
            raise RecipeError(record.problem)
        if "messages" in record:
            return self._task_of_sample(record)
        task: dict[str, Any] = {"where": record.where, "licence": None, "source": None}
        for field in ("licence", "source"):
            if field in record:
                task[field] = record.text(field) or None
        name = record.text("id") if "id" in record else ""
        texts = [record.text(field) for field in self.text.split(",")]
        task["id"] = name or f"row-{number}"
        task["text"] = tidied(". ".join(text for text in texts if text))
        task["part"] = self._part_of_path(record.text(self.media))
        task["seconds"] = None
        if record.get("seconds") not in (None, ""):
            task["seconds"] = record.number("seconds")
        return task

    def _part_of_path(self, path: str) -> dict[str, Any] | None:
        if not path:
            return None
        kind = "video" if path.lower().endswith(VIDEO_FILES) else "audio"
        return self._absolute({"type": kind, kind: path})

    def _task_of_sample(self, record: Record) -> dict[str, Any]:
        try:
            sample = Sample.model_validate(dict(record))
        except ValidationError as error:
            raise RecipeError(describe(error)) from error
        text = ""
        last = sample.messages[-1]
        if last.role == "assistant":
            text = " ".join(part.text for part in last.content if isinstance(part, TextPart))
        part = None
        if len(sample.media) == 1:
            fields = sample.media[0].model_dump(exclude_none=True, exclude_unset=True)
            part = self._absolute(fields)
        return {
            "where": record.where,
            "licence": sample.licence,
            "source": record.get("source"),
            "id": sample.id,
            "text": tidied(text),
            "part": part,
        }

    def _absolute(self, part: dict[str, Any]) -> dict[str, Any]:
        kind = part["type"]
        return {**part, kind: str(self.table.parent / part[kind])}

    def _fault_of_task(self, task: dict[str, Any]) -> Fault | None:
        """Return the fault of a description that shows before a model is asked."""
        text = task["text"]
        count = len(text.split())
        seconds = task.get("seconds")
        if task["part"] is None:
            return Fault("not_one_clip", task["id"])
        if seconds is not None and seconds < self.shortest_clip:
            return Fault(
                "clip_too_short", f"{seconds} s; at least {self.shortest_clip} s are needed"
            )
        if not any(character.isalpha() for character in text):
            return Fault("no_words", text)
        if count > self.longest_text:
            return Fault("description_too_long", f"{count} words; at most {self.longest_text}")
        return None

    def make(
        self, tasks: Sequence[dict[str, Any]], shard: making.Shard
    ) -> Iterator[RecipeRow | Drop]:
        """Ask for captions, judge them, ask for rewritings, judge those."""
        usable: list[dict[str, Any]] = []
        for task in tasks:  # before anything is asked, since answers may have to be paid for
            path = task["part"][task["part"]["type"]]
            reason = lacking(path)
            if reason is None:
                usable.append(task)
            else:
                yield Drop(reason, task["where"], path)
        captioned: list[tuple[dict[str, Any], str]] = []
        for task, answer in zip(usable, self._captions(usable, shard), strict=True):
            fault = self.judge.fault(answer, self.words) if self.clean else None
            if fault is None:
                captioned.append((task, answer.text))
            else:
                yield Drop(fault.reason, task["where"], f"{fault.detail} <- {task['text']}")
        rewritings = iter(self._rewritings([caption for _, caption in captioned], shard))
        for task, caption in captioned:
            yield self._row(task, caption, 0)
            for number in range(1, self.rewritings + 1):
                answer = next(rewritings)
                fault = self.judge.fault(answer, self.words, other=caption)
                if fault is None:
                    yield self._row(task, answer.text, number)
                else:
                    detail = f"rewriting {number}: {fault.detail} <- {caption}"
                    yield Drop(f"rewriting_{fault.reason}", task["where"], detail)

    def _row(self, task: dict[str, Any], caption: str, number: int) -> RecipeRow:
        row = sample_of(task, caption, number)
        own = {"id": f"{self.name}-{row['id']}", "source": self.source}
        return RecipeRow(row | own, self.split)

    def _captions(self, tasks: Sequence[dict[str, Any]], shard: making.Shard) -> list[Answer]:
        """Return a caption for each task: the model's, or the text itself where it is clean."""
        if not self.clean:
            return [Answer(task["text"]) for task in tasks]
        prompts = [self.judge.prompt("caption", text=task["text"]) for task in tasks]
        return self._ask(prompts, shard)

    def _rewritings(self, captions: Sequence[str], shard: making.Shard) -> list[Answer]:
        """Return the rewritings of each caption, one caption after the other."""
        prompts = []
        for caption in captions:
            prompts += [
                self.judge.prompt("rewritings", number, caption=caption)
                for number in range(self.rewritings)
            ]
        return self._ask(prompts, shard)

    def _ask(self, prompts: list[ModelPrompt], shard: making.Shard) -> list[Answer]:
        if not prompts:
            return []
        answers = answers_of(self.answers or shard.answers)
        return answers.ask(load_text_model(self.model), prompts, shard.name)


def tidied(text: str) -> str:
    """Return a description without markup, addresses and surplus space."""
    return " ".join(MARKUP.sub(" ", html.unescape(text)).split())


def sample_of(task: dict[str, Any], caption: str, number: int) -> dict[str, Any]:
    """Return a row: number 0 is the caption, the others are rewritings of it."""
    if number == 0:
        name = task["id"]
        kind = "caption"
    else:
        name = f"{task['id']}-rewriting-{number}"
        kind = "rewriting"
    meta = {"raw": task["text"], "of": task["id"], "rewriting": number}
    if task["source"]:
        meta["source"] = task["source"]
    # The text describes sound, of a video, too.
    about = "audio" if task["part"]["type"] == "video" else None
    return {
        "id": name,
        "messages": caption_messages(task["part"], caption, name, about),
        "licence": task["licence"] or "unknown: the source names none",
        "kind": kind,
        "meta": meta,
    }


def _records(path: Path, fields: Sequence[str]) -> Iterator[Record]:
    if path.suffix in (".csv", ".tsv"):
        return read_csv(path, fields, delimiter="\t" if path.suffix == ".tsv" else ",")
    return read_jsonl(path)


def read_prompts(path: Path, rewritings: int) -> str:
    """Return the text of a file of prompts.

    Raises:
        RecipeError: there is no such file, or it has fewer prompts for rewritings.
    """
    file_digest(path)  # a clear error where there is no such file
    text = path.read_text(encoding="utf-8")
    available = len(judge_of(text).data["rewritings"])
    if rewritings > available:
        raise RecipeError(
            f"--rewritings {rewritings}; {path} has prompts for {available}",
            reason="too_few_prompts",
        )
    return text


def check_model(model: str) -> None:
    """Refuse an empty ``--model``.

    Raises:
        RecipeError: ``no_model``.
    """
    if not model:
        raise RecipeError(
            "no text model; expected --model hf:NAME, http://HOST:PORT/v1#MODEL or rules:FILE.yaml",
            reason="no_model",
        )


def rows(
    source: Path,
    *,
    output: Path,
    model: Annotated[
        str, typer.Option(help="hf:NAME, http://HOST:PORT/v1#MODEL, rules:FILE.yaml or MODEL.yaml.")
    ] = "",
    file: Annotated[
        str, typer.Option(help="The manifest, table or JSON lines in SOURCE.")
    ] = "train.jsonl",
    text: Annotated[
        str, typer.Option(help="Of a table: the fields with the description.")
    ] = "description",
    media: Annotated[
        str, typer.Option(help="Of a table: the field with the file, relative to the table.")
    ] = "audio",
    prompts: Annotated[
        str, typer.Option(help="A file of prompts instead of prompts/describe_clean.yaml.")
    ] = "",
    rewritings: Annotated[
        int, typer.Option(min=0, help="How often each caption is rewritten.")
    ] = 0,
    clean: Annotated[
        bool, typer.Option(help="No: the texts are captions already and are only rewritten.")
    ] = True,
    fewest_words: Annotated[int, typer.Option(min=1, help="Words of a caption, at least.")] = 3,
    most_words: Annotated[int, typer.Option(min=1, help="Words of a caption, at most.")] = 30,
    longest_text: Annotated[
        int, typer.Option(min=1, help="Words of a raw description, at most.")
    ] = 500,
    shortest_clip: Annotated[
        float, typer.Option(help="Of a table with the field seconds: at least so long.")
    ] = 1.0,
    split: making.SplitName = "train",
    answers: making.AnswersFolder = "",
    set_name: making.SetName = "",
    engine: making.Engine = "local",
    workers: making.Workers = 1,
    shard_size: making.ShardSize = 256,
    gpus: making.Gpus = 0.0,
) -> Iterator[RecipeRow | Drop]:
    """Make the captions, and yield their rows."""
    check_model(model)
    job = DescribeClean(
        table=(source / file).resolve(),
        text=text,
        media=media,
        model=model,
        prompts=read_prompts(Path(prompts or PROMPTS), rewritings),
        rewritings=rewritings,
        clean=clean,
        words=(fewest_words, most_words),
        longest_text=longest_text,
        shortest_clip=shortest_clip,
        split=split,
        answers=Path(answers).resolve() if answers else None,
    )
    job = making.named(job, set_name, "clean")
    yield from making.make(
        job, output, engine=engine, workers=workers, shard_size=shard_size, gpus=gpus
    )


if __name__ == "__main__":
    recipe.main(ABOUT, rows)
