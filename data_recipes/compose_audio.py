"""Sounds of two events, made of clips of one each, with captions that say the order and captions that do not fit.

    python data_recipes/compose_audio.py SOURCE --output DIR [--workers 4] [--engine ray]

SOURCE is a folder with a manifest of captioned sounds (or videos with sound), as `esc50.py`, `vggsound.py` and the
other caption recipes write it. Two clips become, in turn:

- `concat`: one behind the other, in both orders, as two files (a pair of the same events in another composition);
- `overlay`: one while the other goes on, at a stated signal-to-noise ratio.

Each wav (16-bit mono) gives a row that captions it (with before / after / then / while), a row that asks which caption
fits, and, for two sounds in a row, one that asks for the second at which the later one begins. Captions that do not fit
stand in `meta.negatives`: the same events in the wrong order or relation, and one event exchanged for another.

Procedures: S. Ghosh et al., CompA (arXiv 2310.08753): composition-aware hard negatives, and audio composed from single
events by templates; A. Sinha et al., TeminAL (arXiv 2408.09269): concatenation and overlay of single sounds, and
inversion in time with the caption inverted; Y. Yuan et al., T-CLAP (arXiv 2404.17806): concatenated and mixed clips
with captions in contrasting order, which a text model writes when `--model` names one: the caption of two sounds in a
row rewritten into the opposite order stands among its negatives instead of the templates'. Silence around a clip's
sound is cut off before, so that the stated times can be heard.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from avllm.data.media.load import MediaError, load_audio
from avllm.data.media.write import write_wav
from avllm.recipes import frame as recipe
from avllm.recipes import making
from avllm.recipes.captioned import Captioned, captioned, clause, licences, sentence, unusable
from avllm.recipes.frame import Dataset, Drop, Row
from avllm.recipes.timespans import say_time
from avllm.text_models.answers import answers_of
from avllm.text_models.base import Answer, Prompt
from avllm.text_models.load import load_text_model

ABOUT = Dataset(
    title="Composed sounds (made of your own clips)",
    licence="that of the clips; each row names it",
    size="three files for each two clips",
    where="make a manifest of captioned sounds first: python data_recipes/esc50.py, vggsound.py, audiocaps.py, ...",
    layout="*.jsonl  a manifest of captioned sounds of one event",
    citation="CompA, arXiv 2310.08753; TeminAL, arXiv 2408.09269; T-CLAP, arXiv 2404.17806",
)
# {0} is heard first, {1} second.
FORWARD = ("{0} before {1}", "{0}, then {1}", "{0}, followed by {1}", "{1} after {0}", "first {0} and afterwards {1}")
TOGETHER = ("{0} while {1}", "{0} and, at the same time, {1}", "{0} at the same time as {1}")
IN_FRONT = (*TOGETHER, "{0} over {1}", "{0}, with {1} in the background")  # one is clearly louder
CLEARLY = 3.0  # decibels
DESCRIBE = ("Describe what you hear.", "What do you hear, and in which order?", "Caption this recording.")
CHOOSE = "Which description fits what you hear?"
ONSET = "At which second do you begin to hear this: {}?"
LOUDNESS = 0.1  # root mean square of an event, full scale 1
PEAK = 0.98
SYSTEM = "You write captions for a data set of sounds. You answer with the caption alone: one plain English sentence."
OPPOSITE = """This caption says which of two sounds is heard first. Write a caption of the same two sounds in the \
opposite order: what comes first here comes last. Keep what makes the sounds, and add nothing. If you cannot, \
answer FAILURE.

Caption: {caption}"""
REFUSALS = ("failure", "i'm sorry", "i am sorry", "i cannot", "i can't", "as an ai", "unable to")
GATE_SECONDS = 0.01  # pieces in which silence is looked for


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
        asked = [load_text_model(self.model).identity, SYSTEM, OPPOSITE] if self.model else None
        return making.settings_of(self, self.manifest) | {"answers": None, "model": None, "asked": asked}

    def plan(self) -> Iterator[dict[str, Any] | Drop]:
        """One task for two clips of unlike captions, and a third whose caption is exchanged for one of theirs."""
        clips: list[Captioned] = []
        for item in captioned(self.manifest, "sound"):
            if isinstance(item, Drop):
                yield item
            else:
                clips.append(item)
        number = 0
        for turn in range(self.times):
            found, alone = pairs(clips, np.random.default_rng([self.seed, 0, turn]))
            yield from (Drop("no_partner", clip.where, f"{clip.id}, turn {turn + 1}") for clip in alone)
            for first, second in found:
                rng = np.random.default_rng([self.seed, 1, number])
                others = {clause(c.caption) for c in (clips[i] for i in rng.integers(len(clips), size=8))}
                others = {other for other in others if other.lower() not in (words(first), words(second))}
                draws = {"gap": round(rng.random(), 6), "place": round(rng.random(), 6)}
                snr = self.snrs[int(rng.integers(len(self.snrs)))]
                two = [asdict(first), asdict(second)]
                yield {"number": number, "clips": two, "other": min(others, default=""), "snr": snr, **draws}
                number += 1

    def make(self, tasks: Sequence[dict[str, Any]], shard: making.Shard) -> Iterator[Row | Drop]:
        """Write the three files of each task; with a text model, have captions of two sounds in a row turned round."""
        items = list(self.files(tasks, shard))
        asked = [i.sample for i in items if isinstance(i, Row) and i.sample["kind"] == "concat.caption" and self.model]
        prompts = [Prompt(OPPOSITE.replace("{caption}", caption_of(sample)), SYSTEM) for sample in asked]
        found: dict[str, str] = {}  # by what ids of a file's rows begin with
        if prompts:
            kept = answers_of(self.answers or shard.answers)
            for sample, answer in zip(asked, kept.ask(load_text_model(self.model), prompts, shard.name), strict=True):
                fault = fault_of(answer, sample)
                if fault is None:
                    found[sample["id"].rpartition("-")[0]] = answer.text.strip()
                else:
                    yield Drop(
                        f"opposite_{fault}", sample["id"], f"{answer.detail or answer.text} <- the template's stays"
                    )
        for item in items:
            opposite = found.get(item.sample["id"].rpartition("-")[0]) if isinstance(item, Row) else None
            yield item if opposite is None or isinstance(item, Drop) else turned_round(item, opposite)

    def files(self, tasks: Sequence[dict[str, Any]], shard: making.Shard) -> Iterator[Row | Drop]:
        """Write the three files of each task, and give their rows."""
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
                found = samples(f"{name}-{made.tag}", made, task, rng)
                yield from (Row(sample | {"source": self.source}, self.split) for sample in found)

    def event(self, clip: dict[str, Any]) -> np.ndarray | Drop:
        """The sound of a clip without the silence around it, at the common loudness; float32 ``(S,)``."""
        try:
            found = load_audio(clip["path"], rate=self.rate, start=clip["start"], end=clip["end"])
        except MediaError as error:
            return unusable(error, clip["where"])
        assert found.sound is not None
        x = audible(found.sound.x.numpy(), self.rate, self.silence)
        if len(x) < self.seconds[0] * self.rate:
            detail = f"{clip['path']}: {len(x) / self.rate:.2f} s of sound; at least {self.seconds[0]} s are needed"
            return Drop("silent" if not len(x) else "too_short", clip["where"], detail)
        return level(x[: round(self.seconds[1] * self.rate)], LOUDNESS)

    def compose(self, task: dict[str, Any], events: list[np.ndarray]) -> Iterator[Made]:
        """Both orders, and one over the other."""
        gap = round(task["gap"] * self.gap * self.rate)
        for tag, order in (("ab", (0, 1)), ("ba", (1, 0))):
            yield in_a_row([events[i] for i in order], order, gap, self.rate, tag)
        yield overlaid(events, task["snr"], task["place"], self.rate)


@dataclass(frozen=True)
class Made:
    """A composed sound.

    Attributes:
        tag: ``ab``, ``ba`` or ``on``.
        x: float32 ``(S,)``.
        order: which of the two clips is heard first; of an overlay, which one is in front.
        spans: seconds (start, end) of the first and the second of ``order``.
        snr: of an overlay, decibels of the front over the other.
    """

    tag: str
    x: np.ndarray
    order: tuple[int, ...]
    spans: list[tuple[float, float]]
    snr: float | None = None


def pairs(
    clips: Sequence[Captioned], rng: np.random.Generator
) -> tuple[list[tuple[Captioned, Captioned]], list[Captioned]]:
    """The clips in random order, two by two, never two of the same caption; and those that no other is left for."""
    found: list[tuple[Captioned, Captioned]] = []
    waiting: deque[Captioned] = deque()  # all of one caption
    for i in rng.permutation(len(clips)):
        if waiting and words(waiting[0]) != words(clips[i]):
            found.append((waiting.popleft(), clips[i]))
        else:
            waiting.append(clips[i])
    return found, list(waiting)


def words(clip: Captioned) -> str:
    """The caption, by which clips are told apart."""
    return clause(clip.caption).lower()


def audible(x: np.ndarray, rate: int, decibels: float) -> np.ndarray:
    """A sound without the beginning and the end that are ``decibels`` below its loudest piece of 10 ms."""
    size = max(1, round(GATE_SECONDS * rate))
    whole = len(x) // size * size
    power = np.square(x[:whole].reshape(-1, size)).mean(1)  # (pieces,)
    if not whole or power.max() <= 0:
        return x[:0]
    loud = np.flatnonzero(power >= power.max() * 10 ** (decibels / 10))
    return x[loud[0] * size : (loud[-1] + 1) * size]


def level(x: np.ndarray, rms: float) -> np.ndarray:
    """A sound scaled to a root mean square."""
    return (x * (rms / math.sqrt(float(np.square(x, dtype=np.float64).mean())))).astype(np.float32)


def below_peak(x: np.ndarray) -> np.ndarray:
    """A sound made softer as a whole where it would clip, so that its parts keep their ratio."""
    return x * min(1.0, PEAK / max(1e-9, float(np.abs(x).max())))


def in_a_row(events: list[np.ndarray], order: tuple[int, ...], gap: int, rate: int, tag: str) -> Made:
    """Two sounds with ``gap`` samples of silence between them, and so much more that the second begins on a tenth."""
    first, second = events
    start = math.ceil((len(first) + gap) * 10 / rate) * rate // 10
    x = np.concatenate([first, np.zeros(start - len(first), np.float32), second])
    return Made(tag, below_peak(x), order, [(0.0, len(first) / rate), (start / rate, len(x) / rate)])


def overlaid(events: list[np.ndarray], snr: float, place: float, rate: int) -> Made:
    """The shorter sound somewhere over the longer one, ``snr`` decibels louder, each measured over its own length."""
    front, back = sorted((0, 1), key=lambda i: (len(events[i]), i))
    voice, ground = events[front], events[back]
    start = round(place * (len(ground) - len(voice)))
    x = ground.copy()
    x[start : start + len(voice)] += voice * 10 ** (snr / 20)
    spans = [(start / rate, (start + len(voice)) / rate), (0.0, len(ground) / rate)]
    return Made("on", below_peak(x), (front, back), spans, snr)


def captions(made: Made, task: dict[str, Any], rng: np.random.Generator) -> tuple[str, list[str]]:
    """A caption that fits, and those that do not."""
    first, second = (clause(task["clips"][i]["caption"]) for i in made.order)
    together = IN_FRONT if (made.snr or 0.0) >= CLEARLY else TOGETHER
    chosen = str(rng.choice(FORWARD if made.snr is None else together))
    if made.snr is not None:
        ordered = str(rng.choice(FORWARD))
        wrong = [ordered.format(first, second), ordered.format(second, first)]
    else:
        wrong = [chosen.format(second, first), str(rng.choice(TOGETHER)).format(first, second)]
    if task["other"]:
        wrong.append(chosen.format(first, task["other"]))
    return sentence(chosen.format(first, second)), [sentence(text) for text in wrong]


def caption_of(sample: dict[str, Any]) -> str:
    """The answer of a row."""
    return str(sample["messages"][-1]["content"])


def fault_of(answer: Answer, sample: dict[str, Any]) -> str | None:
    """What is wrong with a caption that a text model turned round, None when it may stay."""
    text, (_, *others) = answer.text.strip(), sample["meta"]["negatives"]
    if answer.reason:
        return answer.reason
    if not text or "\n" in text:
        return "several_lines" if text else "empty"
    if text.lower().startswith(REFUSALS):
        return "refused"
    if bare(text) in {bare(other) for other in (caption_of(sample), *others)}:
        return "same_as_caption"
    told = [(stems(event["caption"]), stems(text)) for event in sample["meta"]["events"]]
    return "other_sounds" if any(2 * len(event - here) > len(event) for event, here in told) else None


def bare(text: str) -> str:
    """A text by its letters and numbers alone."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def stems(text: str) -> set[str]:
    """What the longer words of a text begin with: `barks` and `barking` are the same."""
    return {word[:4] for word in bare(text).split() if len(word) > 3}


def turned_round(row: Row, opposite: str) -> Row:
    """A row whose template's caption in the wrong order, among negatives and choices, is exchanged for another."""
    meta, choices = row.sample["meta"], row.sample.get("choices")
    if "negatives" not in meta:
        return row
    template, *others = meta["negatives"]
    sample = row.sample | {"meta": {**meta, "negatives": [opposite, *others], "turned_round_by": "text model"}}
    if choices:
        sample["choices"] = [opposite if choice == template else choice for choice in choices]
    return replace(row, sample=sample)


def samples(name: str, made: Made, task: dict[str, Any], rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """The rows of a composed sound."""
    clips = [task["clips"][i] for i in made.order]
    caption, wrong = captions(made, task, rng)
    events = [
        {"start": start, "end": end, "caption": clip["caption"], "clip": clip["id"]}
        for (start, end), clip in zip(made.spans, clips, strict=True)
    ]
    kind = "concat" if made.snr is None else "overlay"
    meta: dict[str, Any] = {"events": events, "negatives": wrong}
    meta |= {"pair": name.rsplit("-", 1)[0]} if made.snr is None else {"snr": made.snr}
    shared = licences([clip["licence"] for clip in clips])

    def row(tag: str, question: str, answer: str, **fields: Any) -> dict[str, Any]:
        content = [{"type": "audio", "audio": f"{name}.wav"}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        return {"id": f"{name}-{tag}", "kind": f"{kind}.{tag}", "messages": messages, **fields, **shared}

    yield row("caption", str(rng.choice(DESCRIBE)), caption, meta=meta)
    yield row("choice", CHOOSE, caption, choices=[str(c) for c in rng.permutation([caption, *wrong])], meta=meta)
    if kind == "concat":
        later = events[1]
        answer = say_time(later["start"])
        yield row(
            "onset", ONSET.format(clause(later["caption"])), answer, seconds=later["start"], meta={"events": events}
        )


def rows(
    source: Path,
    *,
    output: Path,
    manifest: Annotated[str, typer.Option(help="The manifest in SOURCE.")] = "train.jsonl",
    seed: Annotated[int, typer.Option(min=0, help="All that is random follows from it.")] = 0,
    times: Annotated[int, typer.Option(min=1, help="How often each clip is used.")] = 1,
    shortest: Annotated[float, typer.Option(help="Seconds of an event, at least.")] = 0.3,
    longest: Annotated[float, typer.Option(help="Seconds of an event, at most; the rest is cut off.")] = 5.0,
    gap: Annotated[float, typer.Option(min=0.0, help="Seconds of silence between two sounds, about, at most.")] = 0.5,
    snr: Annotated[str, typer.Option(help="Decibels of the front over the other sound, drawn from these.")] = "0,5,10",
    silence: Annotated[float, typer.Option(max=0.0, help="What counts as silence around a sound, decibels.")] = -40.0,
    rate: Annotated[int, typer.Option(min=1000, help="Samples a second.")] = 32_000,
    split: Annotated[str, typer.Option(help="Name of the manifest that is made.")] = "train",
    set_name: making.SetName = "",
    model: Annotated[str, typer.Option(help="Turns captions round: hf:NAME, http://HOST:PORT/v1#MODEL, ...")] = "",
    answers: Annotated[str, typer.Option(help="Folder of the text model's answers that several outputs share.")] = "",
    engine: making.Engine = "local",
    workers: making.Workers = 1,
    shard_size: making.ShardSize = 64,
    gpus: making.Gpus = 0.0,
) -> Iterator[Row | Drop]:
    """Make the sounds, and give their rows."""
    if not 0 < shortest <= longest:
        raise recipe.RecipeError(f"seconds: at least {shortest}, at most {longest}; expected 0 < at least <= at most")
    try:
        snrs = tuple(float(text) for text in snr.split(","))
    except ValueError as error:
        raise recipe.RecipeError(f"--snr {snr!r}; expected decibels with commas between them: 0,5,10") from error
    path = (source / manifest).resolve()
    kept = Path(answers).resolve() if answers else None
    seconds = (shortest, longest)
    job = ComposeAudio(path, seed, times, seconds, gap, snrs, silence, rate, split, model=model, answers=kept)
    job = making.named(job, set_name, "sound")
    yield from making.make(job, output, engine=engine, workers=workers, shard_size=shard_size, gpus=gpus)


if __name__ == "__main__":
    recipe.main(ABOUT, rows)
