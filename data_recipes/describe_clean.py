"""Raw descriptions and labels of sounds -> clean captions, and rewritings of them in terms of acoustics.

    python data_recipes/describe_clean.py SOURCE --output DIR --file sounds.csv --model http://127.0.0.1:8000/v1#Qwen3-8B
    python data_recipes/describe_clean.py SOURCE --output DIR --model hf:Qwen/Qwen3-4B-Instruct-2507 --rewritings 4

SOURCE is a folder with a manifest of any recipe (the answer is the raw description), or a table or JSON lines with a
file and a description a row. Three steps: rules tidy the description and drop what is hopeless; a text model turns it
into one sentence, or says that it cannot; rules drop sentences that still hold names, dates, addresses or talk of
devices, are too short or too long. Then each caption can be rewritten several times.

What is left out stands in dropped.jsonl, with its reason. Answers are kept by their hash: a second run asks only what
is new. The prompts and the words to judge by are data: prompts/describe_clean.yaml, or a file of your own.

Procedures: X. Mei et al., WavCaps (arXiv 2303.17395), the three-stage pipeline of pre-processing, transformation by a
large language model, post-processing; S. Ghosh et al., ReCLAP (arXiv 2409.09213), captions rewritten by a language
model to describe each sound by its acoustic characteristics, several rewritings a caption. The prompts are our own.
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
import yaml
from pydantic import ValidationError

from avllm.data.manifest import describe
from avllm.data.schema import Sample, TextPart
from avllm.recipes import frame as recipe
from avllm.recipes import making
from avllm.recipes.captioned import file_digest
from avllm.recipes.frame import Dataset, Drop, RecipeError, Record, Row, caption_messages, read_csv, read_jsonl
from avllm.recipes.media import VIDEO_FILES
from avllm.recipes.readers import lacking
from avllm.text_models.answers import answers_of
from avllm.text_models.base import Answer, Prompt
from avllm.text_models.load import load_text_model

ABOUT = Dataset(
    title="Clean captions (made of raw descriptions)",
    licence="that of the descriptions; each row names it where the source does",
    size="a row a description, and one a rewriting",
    where="any folder with a manifest or a table of files and descriptions",
    layout="*.jsonl | *.csv | *.tsv  a manifest, or rows of a file and a description",
    citation="WavCaps, arXiv 2303.17395; ReCLAP, arXiv 2409.09213",
    command="python data_recipes/describe_clean.py SOURCE --output DIR --model MODEL --rewritings 4",
)
PROMPTS = Path(__file__).parent / "prompts" / "describe_clean.yaml"
FIELDS = {"system", "caption", "rewritings", "no_sound", "refusals", "dates", "urls", "devices", "no_names"}
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
        """All options, the table's hash and the text model, which is what it is and not what it is called."""
        identity = load_text_model(self.model).identity
        return making.settings_of(self, self.table) | {"answers": None, "model": None, "asked": identity}

    @functools.cached_property
    def told(self) -> Judge:
        """The prompts and the words to judge by."""
        return judge_of(self.prompts)

    def plan(self) -> Iterator[dict[str, Any] | Drop]:
        """One task a description that the rules let pass."""
        for number, record in enumerate(_records(self.table, (self.media, *self.text.split(",")))):
            try:
                task = self._task(record, number)
            except RecipeError as error:
                yield Drop("malformed_row", record.where, str(error))
                continue
            fault = self._hopeless(task)
            yield task if fault is None else Drop(fault[0], record.where, fault[1])

    def _task(self, record: Record, number: int) -> dict[str, Any]:
        """Id, text, media part and licence of a manifest's row or of a table's."""
        if record.problem:
            raise RecipeError(record.problem)
        if "messages" in record:
            return self._task_of_row(record)
        own = {field: record.text(field) or None for field in ("licence", "source") if field in record}
        task = {"where": record.where, "licence": None, "source": None, **own}
        path = record.text(self.media)
        kind = "video" if path.lower().endswith(VIDEO_FILES) else "audio"
        text = ". ".join(filter(None, (record.text(name) for name in self.text.split(","))))
        part = self._absolute({"type": kind, kind: path}) if path else None
        seconds = record.number("seconds") if record.get("seconds") not in (None, "") else None
        name = (record.text("id") if "id" in record else "") or f"row-{number}"
        return {**task, "id": name, "text": tidied(text), "part": part, "seconds": seconds}

    def _task_of_row(self, record: Record) -> dict[str, Any]:
        try:
            row = Sample.model_validate(dict(record))
        except ValidationError as error:
            raise RecipeError(describe(error)) from error
        last = row.messages[-1]
        text = " ".join(p.text for p in last.content if isinstance(p, TextPart)) if last.role == "assistant" else ""
        parts = [part.model_dump(exclude_none=True, exclude_unset=True) for part in row.media]
        part = self._absolute(parts[0]) if len(parts) == 1 else None
        own = {"licence": row.licence, "source": record.get("source")}
        return {"where": record.where, **own, "id": row.id, "text": tidied(text), "part": part}

    def _absolute(self, part: dict[str, Any]) -> dict[str, Any]:
        kind = part["type"]
        return {**part, kind: str(self.table.parent / part[kind])}

    def _hopeless(self, task: dict[str, Any]) -> tuple[str, str] | None:
        """What is wrong with a description before a model is asked: (reason, detail)."""
        text, count = task["text"], len(task["text"].split())
        seconds = task.get("seconds")
        if task["part"] is None:
            return "not_one_clip", task["id"]
        if seconds is not None and seconds < self.shortest_clip:
            return "clip_too_short", f"{seconds} s; at least {self.shortest_clip} s are needed"
        if not any(c.isalpha() for c in text):
            return "no_words", text
        if count > self.longest_text:
            return "description_too_long", f"{count} words; at most {self.longest_text}"
        return None

    def make(self, tasks: Sequence[dict[str, Any]], shard: making.Shard) -> Iterator[Row | Drop]:
        """Ask for captions, judge them, ask for rewritings, judge those."""
        there: list[dict[str, Any]] = []
        for task in tasks:  # before anything is asked, since answers may have to be paid for
            path = task["part"][task["part"]["type"]]
            reason = lacking(path)
            if reason is None:
                there.append(task)
            else:
                yield Drop(reason, task["where"], path)
        kept: list[tuple[dict[str, Any], str]] = []
        for task, answer in zip(there, self._captions(there, shard), strict=True):
            fault = self.told.fault(answer, self.words) if self.clean else None
            if fault is None:
                kept.append((task, answer.text))
            else:
                yield Drop(fault[0], task["where"], f"{fault[1]} <- {task['text']}")
        for task, caption, number, answer in self._rewritten(kept, shard):
            fault = None if number == 0 else self.told.fault(answer, self.words, other=caption)
            if fault is None:
                row = sample(task, answer.text, number)
                yield Row(row | {"id": f"{self.name}-{row['id']}", "source": self.source}, self.split)
            else:
                yield Drop(f"rewriting_{fault[0]}", task["where"], f"rewriting {number}: {fault[1]} <- {caption}")

    def _captions(self, tasks: Sequence[dict[str, Any]], shard: making.Shard) -> list[Answer]:
        if not self.clean:
            return [Answer(task["text"]) for task in tasks]
        return self._ask([self.told.prompt("caption", text=task["text"]) for task in tasks], shard)

    def _rewritten(
        self, kept: list[tuple[dict[str, Any], str]], shard: making.Shard
    ) -> Iterator[tuple[dict[str, Any], str, int, Answer]]:
        """Each caption as number 0, and behind it its rewritings."""
        prompts = [
            self.told.prompt("rewritings", number, caption=caption)
            for _, caption in kept
            for number in range(self.rewritings)
        ]
        answers = iter(self._ask(prompts, shard))
        for task, caption in kept:
            yield task, caption, 0, Answer(caption)
            for number in range(1, self.rewritings + 1):
                yield task, caption, number, next(answers)

    def _ask(self, prompts: list[Prompt], shard: making.Shard) -> list[Answer]:
        if not prompts:
            return []
        return answers_of(self.answers or shard.answers).ask(load_text_model(self.model), prompts, shard.name)


@dataclass(frozen=True)
class Judge:
    """Prompts, and what is wrong with an answer."""

    data: dict[str, Any]

    def prompt(self, name: str, number: int | None = None, **fields: str) -> Prompt:
        """A prompt with its fields filled in; braces in a description are no fields."""
        text: str = self.data[name] if number is None else self.data[name][number]
        for key, value in fields.items():
            text = text.replace("{" + key + "}", value)
        return Prompt(text, self.data["system"])

    def fault(self, answer: Answer, words: tuple[int, int], other: str = "") -> tuple[str, str] | None:
        """What is wrong with an answer: (reason, detail), None when it may stay."""
        if answer.reason:
            return answer.reason, answer.detail
        text = answer.text
        small, count = text.lower().lstrip("\"'* "), len(text.split())
        found: list[tuple[str, bool]] = [
            ("empty", not text),
            ("no_sound_event", small.startswith(tuple(self.data["no_sound"]))),
            ("refused", small.startswith(tuple(self.data["refusals"]))),
            ("several_lines", "\n" in text),
            ("too_short", count < words[0]),
            ("too_long", count > words[1]),
            ("url", self._holds("urls", text)),
            ("date", self._holds("dates", text)),
            ("device", self._holds("devices", text)),
            ("name", bool(self.names(text))),
            ("same_as_caption", bool(other) and _bare(text) == _bare(other)),
        ]
        reason = next((name for name, wrong in found if wrong), None)
        return None if reason is None else (reason, text)

    def _holds(self, name: str, text: str) -> bool:
        return any(re.search(pattern, text, re.IGNORECASE) for pattern in self.data[name])

    def names(self, text: str) -> list[str]:
        """Words with a capital that do not begin a sentence and are not known to be no names."""
        inner = re.findall(r"(?<![.!?:\"])(?<!^)\s+[\"'(]?([A-Z][\w'-]*)", text)
        return [word for word in inner if word.removesuffix("'s") not in self.data["no_names"]]


def _bare(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()


def tidied(text: str) -> str:
    """A description without markup, addresses and surplus space."""
    return " ".join(MARKUP.sub(" ", html.unescape(text)).split())


def sample(task: dict[str, Any], caption: str, number: int) -> dict[str, Any]:
    """A row: number 0 is the caption, the others are rewritings of it."""
    name = task["id"] if number == 0 else f"{task['id']}-rewriting-{number}"
    kind = "caption" if number == 0 else "rewriting"
    meta = {"raw": task["text"], "of": task["id"], "rewriting": number}
    meta |= {"source": task["source"]} if task["source"] else {}
    shared = {"licence": task["licence"] or "unknown: the source names none", "kind": kind, "meta": meta}
    about = "audio" if task["part"]["type"] == "video" else None  # of a video, too, the text tells what is heard
    return {"id": name, "messages": caption_messages(task["part"], caption, name, about), **shared}


def _records(path: Path, fields: Sequence[str]) -> Iterator[Record]:
    if path.suffix in (".csv", ".tsv"):
        return read_csv(path, fields, delimiter="\t" if path.suffix == ".tsv" else ",")
    return read_jsonl(path)


def judge_of(text: str) -> Judge:
    """What a file of prompts holds.

    Raises:
        RecipeError: no YAML, or a field is missing or unknown.
    """
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"the file of prompts is no YAML: {error}") from error
    wrong = sorted(FIELDS ^ set(found)) if isinstance(found, dict) else ["no mapping"]
    if wrong:
        raise RecipeError(f"the file of prompts: {', '.join(wrong)} missing or unknown; expected {sorted(FIELDS)}")
    return Judge(found)


def rows(
    source: Path,
    *,
    output: Path,
    model: Annotated[str, typer.Option(help="hf:NAME, http://HOST:PORT/v1#MODEL, rules:FILE.yaml or MODEL.yaml.")] = "",
    file: Annotated[str, typer.Option(help="The manifest, table or JSON lines in SOURCE.")] = "train.jsonl",
    text: Annotated[str, typer.Option(help="Of a table: the fields with the description.")] = "description",
    media: Annotated[str, typer.Option(help="Of a table: the field with the file, relative to the table.")] = "audio",
    prompts: Annotated[str, typer.Option(help="A file of prompts instead of prompts/describe_clean.yaml.")] = "",
    rewritings: Annotated[int, typer.Option(min=0, help="How often each caption is rewritten.")] = 0,
    clean: Annotated[bool, typer.Option(help="No: the texts are captions already and are only rewritten.")] = True,
    fewest_words: Annotated[int, typer.Option(min=1, help="Words of a caption, at least.")] = 3,
    most_words: Annotated[int, typer.Option(min=1, help="Words of a caption, at most.")] = 30,
    longest_text: Annotated[int, typer.Option(min=1, help="Words of a raw description, at most.")] = 500,
    shortest_clip: Annotated[float, typer.Option(help="Of a table with the field seconds: at least so long.")] = 1.0,
    split: Annotated[str, typer.Option(help="Name of the manifest that is made.")] = "train",
    answers: Annotated[str, typer.Option(help="Folder of answers that several outputs share.")] = "",
    set_name: making.SetName = "",
    engine: making.Engine = "local",
    workers: making.Workers = 1,
    shard_size: making.ShardSize = 256,
    gpus: making.Gpus = 0.0,
) -> Iterator[Row | Drop]:
    """Make the captions, and give their rows."""
    if not model:
        raise RecipeError("no text model; expected --model hf:NAME, http://HOST:PORT/v1#MODEL or rules:FILE.yaml")
    words = Path(prompts) if prompts else PROMPTS
    file_digest(words)  # a clear error where there is no such file
    told = words.read_text(encoding="utf-8")
    known = len(judge_of(told).data["rewritings"])
    if rewritings > known:
        raise RecipeError(f"--rewritings {rewritings}; {words} has prompts for {known}")
    job = making.named(DescribeClean(
        (source / file).resolve(), text, media, model, told, rewritings, clean, (fewest_words, most_words),
        longest_text, shortest_clip, split, Path(answers).resolve() if answers else None,
    ), set_name, "clean")  # fmt: skip
    yield from making.make(job, output, engine=engine, workers=workers, shard_size=shard_size, gpus=gpus)


if __name__ == "__main__":
    recipe.main(ABOUT, rows)
