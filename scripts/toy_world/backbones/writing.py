"""Write the texts from which the toy language model learns: logs, captions and questions."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from batches import Sequence
from logs import entries, facts
from transformers import PreTrainedTokenizerFast

NEEDS = {"seen": "video", "heard": "audio", "both": "both"}
REFUSAL = "unanswerable"
QuestionKey = tuple[str, str | None]
"""Kind of a question, and the thing that it asks about."""
Pairs = list[tuple[str, str]]
"""Questions and their answers."""
# The words of the world by sort, and words of that sort for things that the world does not have.
SORTS = (
    (
        ["red", "green", "blue", "yellow", "purple", "white"],
        ["orange", "pink", "brown", "grey", "black", "gold", "silver", "violet", "cyan", "navy"]
        + ["olive", "teal"],
    ),
    (
        ["circle", "square", "triangle", "cross", "ring"],
        ["star", "heart", "moon", "arrow", "oval", "cube", "cone", "leaf", "fish", "tree", "house"]
        + ["boat"],
    ),
    (
        ["deep", "low", "middle", "high", "shrill"],
        ["soft", "sharp", "dull", "bright", "flat", "round", "thin", "full", "hollow"],
    ),
)


@dataclass
class Clip:
    """A training clip as text.

    Attributes:
        log: entries by stream.
        facts: an entry by kind of question.
        caption: "" where it has none.
        questions: with their answers, by kind and thing asked about.
    """

    log: dict[str, list[list[str]]]
    facts: dict[str, list[str]]
    caption: str
    questions: dict[QuestionKey, Pairs]


def read_clips(world: Path, split: str) -> list[Clip]:
    """Return logs, captions and questions of a split, one entry a clip."""
    questions: dict[str, dict[QuestionKey, Pairs]] = defaultdict(lambda: defaultdict(list))
    for row in read_rows(world / f"{split}.jsonl"):
        question = row["messages"][0]["content"][-1]["text"]
        answer = row["messages"][1]["content"][0]["text"]
        meta = row["meta"]
        questions[meta["clip"]][(meta["asked"], meta.get("slot"))].append((question, answer))
    captions = {
        row["meta"]["clip"]: row["messages"][1]["content"][0]["text"]
        for row in read_rows(world / f"captions_{split}.jsonl")
    }
    scripts = [s for s in read_rows(world / "script.jsonl") if s["split"] == split]
    return [
        Clip(
            entries(s),
            facts(s),
            captions.get(s["id"], ""),
            questions[s["id"]],
        )
        for s in scripts
    ]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSONL file."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


class Writer:
    """Writes clips as sequences of token ids.

    Args:
        tokenizer: of the LLM.
        most: questions after one log.
        captions: share of logs that a caption follows.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, most: int, captions: float = 0.25
    ) -> None:
        self.tokenizer = tokenizer
        self.most = most
        self.captions = captions
        self.user, self.assistant, self.end = tokenizer.convert_tokens_to_ids(
            ["<|user|>", "<|assistant|>", "<|end|>"]
        )
        self.ids_by_text: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        if text not in self.ids_by_text:
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            self.ids_by_text[text] = ids
        return self.ids_by_text[text]

    def write(self, clip: Clip, draw: random.Random, form: str) -> Sequence:
        """Return a log, then the caption and some of the questions.

        Now and then the log lacks one of its streams.

        Args:
            clip: to write about.
            draw: random numbers.
            form: ``whole``, or ``places``, for the questions on those alone.
        """
        log = dict(clip.log)
        for stream in ("video", "audio"):
            if stream in log and draw.random() < 0.07 and form != "places":
                del log[stream]
                log.pop("grid" if stream == "video" else stream, None)
        out = self.begin(clip, log, form)
        if log == clip.log and form != "places" and draw.random() < self.captions:
            self.add(out, [], self.ids(clip.caption))
        asked = [key for key in clip.questions if form != "places" or key[1]]
        for kind, slot in draw.sample(asked, min(self.most, len(asked))):
            self.ask(out, draw.choice(clip.questions[(kind, slot)]), answerable(kind, log))
        return self.rename(out, draw)

    def rename(self, out: Sequence, draw: random.Random) -> Sequence:
        """Exchange the names of colours, shapes and pitches, in half of the logs for foreign ones.

        Some colours never go with some shapes in training. That is not to be learned: names are
        read off the log.
        """
        swap: dict[int, int] = {}
        for own, others in SORTS:
            new = draw.sample(others if draw.random() < 0.5 else own, len(own))
            for old_name, new_name in zip(own, new, strict=True):
                swap[self.ids(old_name)[-1]] = self.ids(new_name)[-1]
        for bag in out.bags:
            bag[:] = [swap.get(i, i) for i in bag]
        out.labels = [swap.get(i, i) for i in out.labels]
        return out

    def begin(self, clip: Clip, log: dict[str, list[list[str]]], form: str) -> Sequence:
        """Return the log alone."""
        places = log.get("grid", [])
        if form != "whole":
            return self.start(places)
        whole = [fact for kind, fact in clip.facts.items() if answerable(kind, log)]
        return self.start(whole + places + interleave(log))

    def start(self, words: list[list[str]]) -> Sequence:
        """Return a log of these entries, without any text about it."""
        bags = [[self.user], *map(self.bag, words)]
        return Sequence(bags, [-100] * len(bags), [0] * len(bags), list(range(len(bags))))

    def mix(self, clips: dict[str, list[Clip]], draw: random.Random) -> Sequence:
        """Return facts of many clips, one of each kind, with their questions.

        So each log has the kinds that few clips have.

        Args:
            clips: those that are asked each kind.
            draw: random numbers.
        """
        missing = draw.choice([(), (), (), (), (), (), ("audio",), ("video",)])
        streams = [stream for stream in ("video", "audio") if stream not in missing]
        about = {kind: draw.choice(others) for kind, others in clips.items()}
        entries = [clip.facts[kind] for kind, clip in about.items() if answerable(kind, streams)]
        out = self.start(draw.sample(entries, len(entries)))
        for kind, clip in draw.sample(sorted(about.items(), key=itemgetter(0)), len(about)):
            self.ask(out, draw.choice(clip.questions[(kind, None)]), answerable(kind, streams))
        return self.rename(out, draw)

    def bag(self, words: list[str]) -> list[int]:
        """Return the last token of each word (all are one token)."""
        return [self.ids(word)[-1] for word in words]

    def ask(self, out: Sequence, pair: tuple[str, str], can_answer: bool) -> None:
        """Add a question with its answer, or with a refusal."""
        question, answer = pair
        self.add(out, self.ids(question), self.ids(answer if can_answer else REFUSAL))

    def add(self, out: Sequence, question: list[int], answer: list[int]) -> None:
        """Add one more text about the log."""
        ids = [*question, self.assistant, *answer, self.end]
        part = out.parts[-1] + 1
        start = out.parts.count(0)
        out.bags += [[i] for i in ids]
        silent = len(question)
        out.labels += [-100] * silent + [*answer, self.end, -100]
        out.parts += [part] * len(ids)
        out.positions += range(start, start + len(ids))


def interleave(log: dict[str, list[list[str]]]) -> list[list[str]]:
    """Return the entries of all streams in the order of time, those of the picture first."""
    steps = max((len(stream) for stream in log.values()), default=0)
    entries_in_order = []
    streams = [log[stream] for stream in ("video", "audio") if stream in log]
    for step in range(steps):
        entries_in_order += [stream[step] for stream in streams if step < len(stream)]
    return entries_in_order


def answerable(kind: str, log: Collection[str]) -> bool:
    """Return whether the streams that a kind of question asks about are there."""
    if kind.startswith("when"):
        return ("audio" if kind == "when.sound" else "video") in log
    stream = NEEDS[kind.split(".")[0]]
    return {"video", "audio"} <= set(log) if stream == "both" else stream in log
