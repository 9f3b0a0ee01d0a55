"""Compose sounds of two events, with captions that say the order and captions that do not fit.

    python data_recipes/compose_audio.py SOURCE --output DIR [--workers 4] [--engine ray]

SOURCE is a folder with a manifest of captioned sounds (or videos with sound), as `esc50.py`,
`vggsound.py` and the other caption recipes write it. Two clips become, in turn:

- `concat`: one after the other, in both orders, as two files (a pair of the same events in another
  composition);
- `overlay`: one while the other goes on, at a stated signal-to-noise ratio.

Each wav (16-bit mono) gives a row that captions it (with before / after / then / while), a row that
asks which caption fits, and, for two sounds in a row, one that asks for the second at which the
later one begins. Captions that do not fit are in `meta.negatives`: the same events in the wrong
order or relation, and one event exchanged for another.

Procedures: S. Ghosh et al., CompA (arXiv 2310.08753): composition-aware hard negatives, and audio
composed from single events by templates; A. Sinha et al., TeminAL (arXiv 2408.09269): concatenation
and overlay of single sounds, and inversion in time with the caption inverted; Y. Yuan et al.,
T-CLAP (arXiv 2404.17806): concatenated and mixed clips with captions in contrasting order, which a
text model writes when `--model` names one: the caption of two sounds in a row rewritten into the
opposite order is among its negatives instead of the templates'. Silence around a clip's sound
is cut off before, so that the stated times can be heard.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from avllm.data.media.compose import ComposedSound, audible, in_a_row, level, overlaid
from avllm.data.media.load import MediaError, load_audio
from avllm.data.media.write import write_wav
from avllm.recipes import frame as recipe
from avllm.recipes import making
from avllm.recipes.captioned import (
    Captioned,
    captioned,
    clause,
    licences,
    pairs,
    sentence,
    unusable,
    words,
)
from avllm.recipes.frame import Dataset, Drop, RecipeRow
from avllm.recipes.timespans import say_time
from avllm.text_models.answers import answers_of
from avllm.text_models.base import Answer, ModelPrompt
from avllm.text_models.judging import rewriting_fault
from avllm.text_models.load import load_text_model

ABOUT = Dataset(
    title="Composed sounds (made of your own clips)",
    licence="that of the clips; each row names it",
    size="three files for each two clips",
    where="make a manifest of captioned sounds first: python data_recipes/esc50.py, vggsound.py, "
    "audiocaps.py, ...",
    layout="*.jsonl  a manifest of captioned sounds of one event",
    citation="CompA, arXiv 2310.08753; TeminAL, arXiv 2408.09269; T-CLAP, arXiv 2404.17806",
)
# {0} is heard first, {1} second.
FORWARD = ("{0} before {1}", "{0}, then {1}", "{0}, followed by {1}", "{1} after {0}")
FORWARD += ("first {0} and afterwards {1}",)
TOGETHER = ("{0} while {1}", "{0} and, at the same time, {1}", "{0} at the same time as {1}")
IN_FRONT = (*TOGETHER, "{0} over {1}", "{0}, with {1} in the background")  # one is clearly louder
CLEARLY = 3.0  # decibels
DESCRIBE = (
    "Describe what you hear.",
    "What do you hear, and in which order?",
    "Caption this recording.",
)
CHOOSE = "Which description fits what you hear?"
ONSET = "At which second do you begin to hear this: {}?"
LOUDNESS = 0.1  # root mean square of an event, full scale 1
SYSTEM = (
    "You write captions for a data set of sounds. "
    "You answer with the caption alone: one plain English sentence."
)
OPPOSITE = """This caption says which of two sounds is heard first. \
Write a caption of the same two sounds in the opposite order: what comes first here comes last. \
Keep what makes the sounds, and add nothing. If you cannot, answer FAILURE.

Caption: {caption}"""


@dataclass(frozen=True)
class ComposeAudio:
    """The job; see `rows` for the options."""

    manifest: Path
    seed: int
    times: int
    seconds: tuple[float, float]
    gap: float
    snrs: tuple[float, ...]
    silence: float
    rate: int
    split: str
    name: str = "sound"
    source: str = "compose_audio"
    model: str = ""
    answers: Path | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """All options, the manifest's hash, and what a text model is asked."""
        asked = None
        if self.model:
            asked = [load_text_model(self.model).identity, SYSTEM, OPPOSITE]
        settings = making.settings_of(self, self.manifest)
        return settings | {"answers": None, "model": None, "asked": asked}

    def plan(self) -> Iterator[dict[str, Any] | Drop]:
        """Yield one task for two clips of unlike captions.

        A third clip's caption is exchanged for one of theirs.
        """
        clips: list[Captioned] = []
        for item in captioned(self.manifest, "sound"):
            if isinstance(item, Drop):
                yield item
            else:
                clips.append(item)
        number = 0
        for turn in range(self.times):
            paired, alone = pairs(clips, np.random.default_rng([self.seed, 0, turn]))
            for clip in alone:
                yield Drop("no_partner", clip.where, f"{clip.id}, turn {turn + 1}")
            for first, second in paired:
                yield self.task(number, first, second, clips)
                number += 1

    def task(
        self, number: int, first: Captioned, second: Captioned, clips: Sequence[Captioned]
    ) -> dict[str, Any]:
        """Return the task of two clips, with all that is drawn for it."""
        rng = np.random.default_rng([self.seed, 1, number])
        drawn = [clips[i] for i in rng.integers(len(clips), size=8)]
        own_words = (words(first), words(second))
        others = [clause(clip.caption) for clip in drawn if words(clip) not in own_words]
        gap = round(rng.random(), 6)
        place = round(rng.random(), 6)
        snr = self.snrs[int(rng.integers(len(self.snrs)))]
        return {
            "number": number,
            "clips": [asdict(first), asdict(second)],
            "other": min(others, default=""),
            "snr": snr,
            "gap": gap,
            "place": place,
        }

    def make(
        self, tasks: Sequence[dict[str, Any]], shard: making.Shard
    ) -> Iterator[RecipeRow | Drop]:
        """Write the three files of each task, and yield their rows.

        With a text model, it rewrites captions of two sounds in a row into the opposite order.
        """
        items = list(self.files(tasks, shard))
        opposites: dict[str, str] = {}  # by the beginning of the ids of a file's rows
        if self.model:
            for sample, answer in self.ask_for_opposites(items, shard):
                meta = sample["meta"]
                # The first negative is the template's caption in the opposite order.
                others = [caption_of(sample), *meta["negatives"][1:]]
                events = [event["caption"] for event in meta["events"]]
                fault = rewriting_fault(answer, others, events)
                if fault is None:
                    opposites[id_of_file(sample)] = answer.text.strip()
                else:
                    seen = answer.detail or answer.text
                    detail = f"{seen} <- the template's stays"
                    yield Drop(f"opposite_{fault}", sample["id"], detail)
        for item in items:
            if isinstance(item, RecipeRow) and id_of_file(item.sample) in opposites:
                yield turned_round(item, opposites[id_of_file(item.sample)])
            else:
                yield item

    def ask_for_opposites(
        self, items: Sequence[RecipeRow | Drop], shard: making.Shard
    ) -> list[tuple[dict[str, Any], Answer]]:
        """Return the captions of two sounds in a row, each with the text model's answer."""
        rows = [item.sample for item in items if isinstance(item, RecipeRow)]
        samples = [sample for sample in rows if sample["kind"] == "concat.caption"]
        if not samples:
            return []
        texts = [OPPOSITE.replace("{caption}", caption_of(sample)) for sample in samples]
        prompts = [ModelPrompt(text, SYSTEM) for text in texts]
        answers = answers_of(self.answers or shard.answers)
        model = load_text_model(self.model)
        return list(zip(samples, answers.ask(model, prompts, shard.name), strict=True))

    def files(
        self, tasks: Sequence[dict[str, Any]], shard: making.Shard
    ) -> Iterator[RecipeRow | Drop]:
        """Write the three files of each task, and yield their rows."""
        for task in tasks:
            events: list[np.ndarray] = []
            for clip in task["clips"]:
                x = self.event(clip)
                if isinstance(x, Drop):
                    yield x
                else:
                    events.append(x)
            name = f"{self.name}-{task['number']:06d}"
            if len(events) < 2:
                yield Drop("too_few_clips", name, f"{len(events)} of 2 clips could be used")
                continue
            rng = np.random.default_rng([self.seed, 2, task["number"]])
            for made in self.compose(task, events):
                write_wav(shard.folder / f"{name}-{made.tag}.wav", made.x, self.rate)
                for sample in samples(f"{name}-{made.tag}", made, task, rng):
                    yield RecipeRow(sample | {"source": self.source}, self.split)

    def event(self, clip: dict[str, Any]) -> np.ndarray | Drop:
        """Return the sound of a clip, float32 ``(S,)``, or why it cannot be used.

        It is without the silence around it, and has the common loudness.
        """
        try:
            decoded = load_audio(clip["path"], rate=self.rate, start=clip["start"], end=clip["end"])
        except MediaError as error:
            return unusable(error, clip["where"])
        assert decoded.sound is not None
        x = audible(decoded.sound.x.numpy(), self.rate, self.silence)
        shortest, longest = self.seconds
        if len(x) < shortest * self.rate:
            seconds = len(x) / self.rate
            detail = f"{clip['path']}: {seconds:.2f} s of sound; at least {shortest} s are needed"
            return Drop("too_short" if len(x) else "silent", clip["where"], detail)
        return level(x[: round(longest * self.rate)], LOUDNESS)

    def compose(self, task: dict[str, Any], events: list[np.ndarray]) -> Iterator[ComposedSound]:
        """Yield both orders, and one over the other."""
        gap = round(task["gap"] * self.gap * self.rate)
        for tag, order in (("ab", (0, 1)), ("ba", (1, 0))):
            yield in_a_row([events[i] for i in order], order, gap, self.rate, tag)
        yield overlaid(events, task["snr"], task["place"], self.rate)


def id_of_file(sample: dict[str, Any]) -> str:
    """Return the beginning of a row's id, which all rows of its file share."""
    return sample["id"].rpartition("-")[0]


def captions(
    made: ComposedSound, task: dict[str, Any], rng: np.random.Generator
) -> tuple[str, list[str]]:
    """Return a caption that fits, and those that do not."""
    first, second = [clause(task["clips"][i]["caption"]) for i in made.order]
    if made.snr is None:
        template = str(rng.choice(FORWARD))
        together = str(rng.choice(TOGETHER))
        wrong = [template.format(second, first), together.format(first, second)]
    else:
        template = str(rng.choice(IN_FRONT if made.snr >= CLEARLY else TOGETHER))
        ordered = str(rng.choice(FORWARD))
        wrong = [ordered.format(first, second), ordered.format(second, first)]
    if task["other"]:
        wrong.append(template.format(first, task["other"]))
    return sentence(template.format(first, second)), [sentence(text) for text in wrong]


def caption_of(sample: dict[str, Any]) -> str:
    """Return the answer of a row."""
    return str(sample["messages"][-1]["content"])


def turned_round(row: RecipeRow, opposite: str) -> RecipeRow:
    """Return a row with another caption in the opposite order, among negatives and choices."""
    meta = row.sample["meta"]
    if "negatives" not in meta:
        return row
    template, *others = meta["negatives"]
    meta = {**meta, "negatives": [opposite, *others], "turned_round_by": "text model"}
    sample = row.sample | {"meta": meta}
    choices = row.sample.get("choices")
    if choices:
        sample["choices"] = [opposite if choice == template else choice for choice in choices]
    return replace(row, sample=sample)


def samples(
    name: str, made: ComposedSound, task: dict[str, Any], rng: np.random.Generator
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a composed sound."""
    clips = [task["clips"][i] for i in made.order]
    caption, wrong = captions(made, task, rng)
    events = [
        {"start": start, "end": end, "caption": clip["caption"], "clip": clip["id"]}
        for (start, end), clip in zip(made.spans, clips, strict=True)
    ]
    meta: dict[str, Any] = {"events": events, "negatives": wrong}
    if made.snr is None:
        kind = "concat"
        meta["pair"] = name.rsplit("-", 1)[0]
    else:
        kind = "overlay"
        meta["snr"] = made.snr
    shared = licences([clip["licence"] for clip in clips])

    def row(tag: str, question: str, answer: str, **fields: Any) -> dict[str, Any]:
        content = [{"type": "audio", "audio": f"{name}.wav"}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        return {
            "id": f"{name}-{tag}",
            "kind": f"{kind}.{tag}",
            "messages": messages,
            **fields,
            **shared,
        }

    yield row("caption", str(rng.choice(DESCRIBE)), caption, meta=meta)
    choices = [str(choice) for choice in rng.permutation([caption, *wrong])]
    yield row("choice", CHOOSE, caption, choices=choices, meta=meta)
    if kind == "concat":
        later = events[1]
        start = later["start"]
        question = ONSET.format(clause(later["caption"]))
        yield row("onset", question, say_time(start), seconds=start, meta={"events": events})


def decibels_of(text: str) -> tuple[float, ...]:
    """Return the decibels of ``0,5,10``."""
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError as error:
        raise recipe.RecipeError(
            f"--snr {text!r}; expected decibels with commas between them: 0,5,10",
            reason="bad_snr",
        ) from error


def rows(
    source: Path,
    *,
    output: Path,
    manifest: making.ManifestName = "train.jsonl",
    seed: making.Seed = 0,
    times: Annotated[int, typer.Option(min=1, help="How often each clip is used.")] = 1,
    shortest: Annotated[float, typer.Option(help="Seconds of an event, at least.")] = 0.3,
    longest: Annotated[
        float, typer.Option(help="Seconds of an event, at most; the rest is cut off.")
    ] = 5.0,
    gap: Annotated[
        float, typer.Option(min=0.0, help="Seconds of silence between two sounds, about, at most.")
    ] = 0.5,
    snr: Annotated[
        str, typer.Option(help="Decibels of the front over the other sound, drawn from these.")
    ] = "0,5,10",
    silence: Annotated[
        float, typer.Option(max=0.0, help="What counts as silence around a sound, decibels.")
    ] = -40.0,
    rate: Annotated[int, typer.Option(min=1000, help="Samples a second.")] = 32_000,
    split: making.SplitName = "train",
    set_name: making.SetName = "",
    model: Annotated[
        str, typer.Option(help="Turns captions round: hf:NAME, http://HOST:PORT/v1#MODEL, ...")
    ] = "",
    answers: making.AnswersFolder = "",
    engine: making.Engine = "local",
    workers: making.Workers = 1,
    shard_size: making.ShardSize = 64,
    gpus: making.Gpus = 0.0,
) -> Iterator[RecipeRow | Drop]:
    """Make the sounds, and yield their rows."""
    if not 0 < shortest <= longest:
        raise recipe.RecipeError(
            f"seconds: at least {shortest}, at most {longest}; expected 0 < at least <= at most",
            reason="bad_range",
        )
    job = ComposeAudio(
        manifest=(source / manifest).resolve(),
        seed=seed,
        times=times,
        seconds=(shortest, longest),
        gap=gap,
        snrs=decibels_of(snr),
        silence=silence,
        rate=rate,
        split=split,
        model=model,
        answers=Path(answers).resolve() if answers else None,
    )
    job = making.named(job, set_name, "sound")
    yield from making.make(
        job, output, engine=engine, workers=workers, shard_size=shard_size, gpus=gpus
    )


if __name__ == "__main__":
    recipe.main(ABOUT, rows)
