"""PU-VALOR: trimmed captioned clips -> pseudo-untrimmed videos whose event boundaries are known.

    python data_recipes/pu_valor.py SOURCE --output DIR [--workers 4] [--engine ray]

SOURCE is a folder with a manifest of captioned video clips, as `valor.py` and the other caption recipes write it. Clips
of similar captions are put together, each is cut to a random length and played a little faster or slower, and they are
joined in random order into one mp4 (H.264 + AAC, really re-encoded, picture and sound on one clock). Each video gives a
row of dense captioning, and for each of its events one of temporal grounding and one that asks what happens between two
times; times are seconds of the video.

Procedure: Y. Tang et al., Empowering LLMs with Pseudo-Untrimmed Videos for Audio-Visual Temporal Understanding
(AVicuna), arXiv 2403.16276, the part on PU-VALOR: event-based clustering of the clips by their captions, random
temporal scaling, permutation. Unlike there, captions are embedded by TF-IDF unless vectors are given (--embeddings),
and the lengths and speeds are options.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from avllm.data.media.load import MediaError, Sampling, load_video, probe
from avllm.data.media.write import AAC_RATES, Mp4Writer, faster, fitted
from avllm.recipes import frame as recipe
from avllm.recipes import making
from avllm.recipes.captioned import Captioned, captioned, clause, licences, sentence, unusable
from avllm.recipes.frame import Dataset, Drop, RecipeError, Row
from avllm.recipes.timespans import say_events, say_span, say_spans

ABOUT = Dataset(
    title="PU-VALOR (made of your own clips)",
    licence="that of the clips; each row names it",
    size="as many videos as there are groups of clips; the paper's has 114,000",
    where="make a manifest of captioned clips first: python data_recipes/valor.py",
    layout="*.jsonl  a manifest of captioned video clips",
    citation="Tang et al., Empowering LLMs with Pseudo-Untrimmed Videos for Audio-Visual Temporal Understanding, "
    "arXiv 2403.16276",
)
DENSE = (
    "List what happens in this video, with the seconds at which each event starts and ends.",
    "Describe every event of the video and when it takes place, in seconds.",
    "What happens in the video, and from which second to which?",
)
GROUNDING = (
    "When does this happen in the video: {}? Answer in seconds.",
    "From which second to which do you see or hear this: {}?",
    "Find the part of the video with this event: {}. Give its start and end in seconds.",
)
SEGMENT = (
    "What happens {}?",
    "Describe the part of the video {}.",
    "What do you see and hear {}?",
)
OPEN_GROUPS = 16  # groups of a cluster that are filled at a time


@dataclass(frozen=True)
class PuValor:
    """The job; see `rows` for the options."""

    manifest: Path
    seed: int
    cluster_size: int
    segments: tuple[int, int]
    seconds: tuple[float, float]
    speeds: tuple[float, float]
    fps: int
    size: tuple[int, int]
    rate: int
    embeddings: Path | None
    split: str
    name: str = "pu"
    source: str = "pu_valor"

    @property
    def settings(self) -> dict[str, Any]:
        """All options, and the manifest's hash."""
        return making.settings_of(self, self.manifest, *([self.embeddings] if self.embeddings else []))

    def plan(self) -> Iterator[dict[str, Any] | Drop]:
        """One task a video: its clips in order, and for each the random numbers that cut it."""
        clips, count = [], 0
        for item in captioned(self.manifest, "video"):
            count += 1
            if isinstance(item, Drop):
                yield item
            else:
                clips.append(item)
        if not clips:
            return
        vectors = None if self.embeddings is None else self._embedded(count)[[clip.row for clip in clips]]
        labels = clusters([clip.caption for clip in clips], self.cluster_size, self.seed, vectors)
        number = 0
        for label in range(labels.max() + 1):
            for group in self._groups([clips[i] for i in np.flatnonzero(labels == label)], label):
                if len(group) < self.segments[0]:
                    yield from (Drop("too_few_alike", clip.where, clip.id) for clip in group)
                    continue
                draws = np.random.default_rng([self.seed, 1, number]).random((len(group), 3)).round(6).tolist()
                yield {
                    "number": number,
                    "cluster": label,
                    "clips": [{**asdict(c), "draws": d} for c, d in zip(group, draws, strict=True)],
                }
                number += 1

    def _embedded(self, count: int) -> np.ndarray:
        """The vectors of all rows of the manifest, ``(N, D)``."""
        assert self.embeddings is not None
        found = np.load(self.embeddings)
        if found.ndim != 2 or len(found) != count:
            seen = f"{self.embeddings} holds an array of shape {found.shape}"
            raise RecipeError(f"{seen}; expected ({count}, D): a vector for each row of {self.manifest}")
        return found

    def _groups(self, clips: Sequence[Captioned], label: int) -> Iterator[list[Captioned]]:
        """The clips of a cluster in random order, in groups of random size without two equal captions."""
        rng = np.random.default_rng([self.seed, 0, label])
        open_groups: list[tuple[int, list[Captioned]]] = []
        for i in rng.permutation(len(clips)):
            clip = clips[i]
            for place, (size, group) in enumerate(open_groups):
                if all(clause(clip.caption).lower() != clause(other.caption).lower() for other in group):
                    group.append(clip)
                    if len(group) == size:
                        yield open_groups.pop(place)[1]
                    break
            else:
                open_groups.append((int(rng.integers(self.segments[0], self.segments[1] + 1)), [clip]))
            if len(open_groups) > OPEN_GROUPS:
                yield open_groups.pop(0)[1]
        yield from (group for _, group in open_groups)

    def make(self, tasks: Sequence[dict[str, Any]], shard: making.Shard) -> Iterator[Row | Drop]:
        """Cut and join the clips of each task."""
        for task in tasks:
            name = f"{self.name}-{task['number']:06d}"
            events, drops = self.write(task, shard.folder / f"{name}.mp4")
            yield from drops
            if len(events) < self.segments[0]:
                (shard.folder / f"{name}.mp4").unlink(missing_ok=True)
                yield Drop("too_few_clips", name, f"{len(events)} of {len(task['clips'])} clips could be used")
                continue
            rng = np.random.default_rng([self.seed, 2, task["number"]])
            found = samples(name, f"{name}.mp4", events, rng)
            yield from (Row(sample | {"source": self.source}, self.split) for sample in found)

    def write(self, task: dict[str, Any], path: Path) -> tuple[list[dict[str, Any]], list[Drop]]:
        """Write a video; returns its events (start and end in seconds of it) and the clips that could not be used."""
        usable, drops = self._probed(task)
        events: list[dict[str, Any]] = []
        width, height = self.size
        rate = self.rate if any(info.has_audio for _, info in usable) else None
        if len(usable) < self.segments[0]:
            return events, drops
        with Mp4Writer(path, fps=self.fps, width=width, height=height, rate=rate) as out:
            for clip, info in usable:
                start, speed, steps = self.cut(clip, info.duration)
                try:
                    frames, sound = self._read(clip["path"], start, speed, steps, out.frames)
                except MediaError as error:
                    drops.append(unusable(error, clip["where"]))
                    continue
                first = out.frames / self.fps
                out.add(fitted(frames, width, height), sound if rate is not None else None)
                taken = [round(start, 6), round(start + steps / self.fps * speed, 6)]
                event = {"start": first, "end": out.frames / self.fps, "caption": clip["caption"], "clip": clip["id"]}
                more = {"taken": taken, "speed": speed, "sound": info.has_audio, "licence": clip["licence"]}
                events.append(event | more)
        return events, drops

    def _probed(self, task: dict[str, Any]) -> tuple[list[tuple[dict[str, Any], Any]], list[Drop]]:
        usable, drops = [], []
        for clip in task["clips"]:
            try:
                info = probe(clip["path"])
            except MediaError as error:
                drops.append(unusable(error, clip["where"]))
                continue
            seconds = min(clip["end"] or info.duration, info.duration) - (clip["start"] or 0.0)
            if not info.has_video:
                drops.append(Drop("no_video", clip["where"], clip["path"]))
            elif seconds < self.seconds[0]:
                detail = f"{clip['path']}: {seconds:.2f} s; at least {self.seconds[0]} s are needed"
                drops.append(Drop("too_short", clip["where"], detail))
            else:
                usable.append((clip, info))
        return usable, drops

    def cut(self, clip: dict[str, Any], duration: float) -> tuple[float, float, int]:
        """Where a clip is cut: second of its file, speed, and frames of the video that it becomes."""
        begin = clip["start"] or 0.0
        available = min(clip["end"] or duration, duration) - begin
        length, place, pace = clip["draws"]
        wanted = self.seconds[0] + length * (min(self.seconds[1], available) - self.seconds[0])
        speed = round(self.speeds[0] * (self.speeds[1] / self.speeds[0]) ** pace, 4)
        steps = max(1, int(wanted / speed * self.fps + 1e-6))
        return begin + place * max(0.0, available - steps / self.fps * speed), speed, steps

    def _read(self, path: str, start: float, speed: float, steps: int, at: int) -> tuple[np.ndarray, np.ndarray]:
        """Frames ``(steps, H, W, 3)`` and exactly the samples that belong to them when they begin at frame ``at``."""
        end = start + steps / self.fps * speed
        sampling = Sampling(num_frames=steps, short_side=min(self.size))
        found = load_video(path, start=start, end=end, sampling=sampling, rate=self.rate)
        length = round((at + steps) / self.fps * self.rate) - round(at / self.fps * self.rate)
        sound = np.zeros(length, np.float32)
        if found.sound is not None:
            heard = np.pad(found.sound.x.numpy(), (round(found.sound.start * self.rate), 0))
            sound = faster(heard, self.rate, speed, length)
        assert found.frames is not None
        return found.frames.x.numpy(), sound


def clusters(captions: Sequence[str], size: int, seed: int, vectors: np.ndarray | None = None) -> np.ndarray:
    """The cluster of each caption, int ``(N,)``, about ``size`` captions in each.

    k-means on TF-IDF, or on the embeddings ``(N, D)`` that are given.
    """
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.feature_extraction.text import TfidfVectorizer

    count = max(1, round(len(captions) / size))
    if count == 1:
        return np.zeros(len(captions), int)
    if vectors is None:
        vectors = TfidfVectorizer(stop_words="english", sublinear_tf=True, max_features=20_000).fit_transform(captions)
    return MiniBatchKMeans(count, random_state=seed, n_init=3, batch_size=4096).fit_predict(vectors)


def samples(name: str, path: str, events: list[dict[str, Any]], rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """The rows of a video: all events, each event's times, and what is between two times."""
    shared = licences([event["licence"] for event in events])
    listed = [{k: v for k, v in event.items() if k != "licence"} for event in events]
    lines = say_events([((e["start"], e["end"]), e["caption"]) for e in events])

    def row(tag: str, kind: str, question: str, answer: str, meta: dict[str, Any]) -> dict[str, Any]:
        content = [{"type": "video", "video": path}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        return {"id": f"{name}-{tag}", "kind": kind, "messages": messages, "meta": {"video": name, **meta}, **shared}

    yield row("dense", "dense_caption", str(rng.choice(DENSE)), lines, {"events": listed})
    for number, event in enumerate(events):
        span, times = (event["start"], event["end"]), {"start": event["start"], "end": event["end"]}
        question = str(rng.choice(GROUNDING)).format(clause(event["caption"]))
        yield row(f"when-{number}", "grounding", question, say_spans([span]), times)
        question = str(rng.choice(SEGMENT)).format(say_span(span))
        yield row(f"what-{number}", "segment", question, sentence(event["caption"]), times)


def rows(
    source: Path,
    *,
    output: Path,
    manifest: Annotated[str, typer.Option(help="The manifest in SOURCE.")] = "train.jsonl",
    seed: Annotated[int, typer.Option(min=0, help="All that is random follows from it.")] = 0,
    cluster_size: Annotated[int, typer.Option(min=2, help="Clips in a cluster of similar captions, about.")] = 50,
    fewest: Annotated[int, typer.Option(min=2, help="Clips in a video, at least.")] = 2,
    most: Annotated[int, typer.Option(min=2, help="Clips in a video, at most.")] = 5,
    shortest: Annotated[float, typer.Option(help="Seconds of a clip, at least.")] = 2.0,
    longest: Annotated[float, typer.Option(help="Seconds of a clip, at most.")] = 10.0,
    slowest: Annotated[float, typer.Option(min=0.5, help="Speed of a clip, at least.")] = 0.8,
    fastest: Annotated[float, typer.Option(max=4.0, help="Speed of a clip, at most.")] = 1.25,
    fps: Annotated[int, typer.Option(min=1, help="Frames a second; with 10 the times in texts are exact.")] = 10,
    width: Annotated[int, typer.Option(min=16, help="Pixels; clips keep their aspect, the rest is black.")] = 480,
    height: Annotated[int, typer.Option(min=16, help="Pixels.")] = 270,
    rate: Annotated[int, typer.Option(help="Samples a second.")] = 32_000,
    embeddings: Annotated[str, typer.Option(help="A .npy of one vector a manifest row, instead of TF-IDF.")] = "",
    split: Annotated[str, typer.Option(help="Name of the manifest that is made.")] = "train",
    set_name: making.SetName = "",
    engine: making.Engine = "local",
    workers: making.Workers = 1,
    shard_size: making.ShardSize = 32,
) -> Iterator[Row | Drop]:
    """Make the videos, and give their rows."""
    for what, low, high in (("clips", fewest, most), ("seconds", shortest, longest), ("speed", slowest, fastest)):
        if not 0 < low <= high:
            raise RecipeError(f"{what}: at least {low} and at most {high}; expected 0 < at least <= at most")
    if width % 2 or height % 2:
        raise RecipeError(f"a picture of {width}x{height}; H.264 wants even numbers")
    if rate not in AAC_RATES:
        raise RecipeError(f"{rate} samples a second; AAC has {', '.join(map(str, AAC_RATES))}")
    vectors = Path(embeddings).resolve() if embeddings else None
    job = PuValor(
        (source / manifest).resolve(), seed, cluster_size, (fewest, most), (shortest, longest), (slowest, fastest),
        fps, (width, height), rate, vectors, split,
    )  # fmt: skip
    yield from making.make(
        making.named(job, set_name, "pu"), output, engine=engine, workers=workers, shard_size=shard_size
    )


if __name__ == "__main__":
    recipe.main(ABOUT, rows)
