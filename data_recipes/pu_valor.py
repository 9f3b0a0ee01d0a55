"""Join trimmed captioned clips to pseudo-untrimmed videos whose events have known times.

    python data_recipes/pu_valor.py SOURCE --output DIR [--workers 4] [--engine ray]

SOURCE is a folder with a manifest of captioned video clips, as `valor.py` and the other caption
recipes write it. Clips of similar captions are put together, each is cut to a random length and
played a little faster or slower, and they are joined in random order into one mp4 (H.264 + AAC,
really re-encoded, picture and sound on one clock). Each video gives a row of dense captioning, and
for each of its events one of temporal grounding and one that asks what happens between two times;
times are seconds of the video.

Procedure: Y. Tang et al., Empowering LLMs with Pseudo-Untrimmed Videos for Audio-Visual Temporal
Understanding (AVicuna), arXiv 2403.16276, the part on PU-VALOR: event-based clustering of the clips
by their captions, random temporal scaling, permutation. Unlike there, captions are embedded by
TF-IDF unless vectors are given (--embeddings), and the lengths and speeds are options.
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
from avllm.recipes.captioned import (
    Captioned,
    captioned,
    clause,
    clusters,
    groups,
    licences,
    sentence,
    unusable,
)
from avllm.recipes.frame import Dataset, Drop, RecipeError, RecipeRow
from avllm.recipes.timespans import say_events, say_span, say_spans

ABOUT = Dataset(
    title="PU-VALOR (made of your own clips)",
    licence="that of the clips; each row names it",
    size="as many videos as there are groups of clips; the paper's has 114,000",
    where="make a manifest of captioned clips first: python data_recipes/valor.py",
    layout="*.jsonl  a manifest of captioned video clips",
    citation="Tang et al., Empowering LLMs with Pseudo-Untrimmed Videos for Audio-Visual Temporal "
    "Understanding, arXiv 2403.16276",
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


@dataclass(frozen=True)
class Cut:
    """The interval of a clip that becomes a part of a video.

    Attributes:
        start: seconds of the clip's file.
        speed: at which it is played.
        frames: of the video.
    """

    start: float
    speed: float
    frames: int

    def end(self, fps: int) -> float:
        """Return its end, in seconds of the clip's file."""
        return self.start + self.frames / fps * self.speed


@dataclass(frozen=True)
class ProbedClip:
    """A clip of a task that can be used, with the seconds of its file."""

    clip: dict[str, Any]
    duration: float
    has_audio: bool


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
        """All options, and the hashes of the manifest and the embeddings."""
        files = [self.manifest]
        if self.embeddings is not None:
            files.append(self.embeddings)
        return making.settings_of(self, *files)

    def plan(self) -> Iterator[dict[str, Any] | Drop]:
        """Yield one task a video: its clips in order, each with random numbers that cut it."""
        clips: list[Captioned] = []
        count = 0
        for item in captioned(self.manifest, "video"):
            count += 1
            if isinstance(item, Drop):
                yield item
            else:
                clips.append(item)
        if not clips:
            return
        vectors = None
        if self.embeddings is not None:
            vectors = self._embedded(self.embeddings, count)[[clip.row for clip in clips]]
        captions = [clip.caption for clip in clips]
        labels = clusters(captions, self.cluster_size, self.seed, vectors)
        number = 0
        for label in range(labels.max() + 1):
            alike = [clips[i] for i in np.flatnonzero(labels == label)]
            rng = np.random.default_rng([self.seed, 0, label])
            for group in groups(alike, self.segments, rng):
                if len(group) < self.segments[0]:
                    yield from (Drop("too_few_alike", clip.where, clip.id) for clip in group)
                    continue
                yield self._task(number, label, group)
                number += 1

    def _task(self, number: int, label: int, group: Sequence[Captioned]) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, 1, number])
        draws = rng.random((len(group), 3)).round(6).tolist()  # length, place, speed of each clip
        clips = [{**asdict(clip), "draws": drawn} for clip, drawn in zip(group, draws, strict=True)]
        return {"number": number, "cluster": label, "clips": clips}

    def _embedded(self, path: Path, count: int) -> np.ndarray:
        """Return the vectors of all rows of the manifest, ``(N, D)``."""
        vectors = np.load(path)
        if vectors.ndim != 2 or len(vectors) != count:
            raise RecipeError(
                f"{path} holds an array of shape {vectors.shape}; "
                f"expected ({count}, D): a vector for each row of {self.manifest}",
                reason="bad_embeddings",
            )
        return vectors

    def make(
        self, tasks: Sequence[dict[str, Any]], shard: making.Shard
    ) -> Iterator[RecipeRow | Drop]:
        """Cut and join the clips of each task."""
        for task in tasks:
            name = f"{self.name}-{task['number']:06d}"
            path = shard.folder / f"{name}.mp4"
            usable, drops = self._probed(task)
            events: list[dict[str, Any]] = []
            if len(usable) >= self.segments[0]:
                events = self._write(usable, path, drops)
            yield from drops
            if len(events) < self.segments[0]:
                path.unlink(missing_ok=True)
                detail = f"{len(events)} of {len(task['clips'])} clips could be used"
                yield Drop("too_few_clips", name, detail)
                continue
            rng = np.random.default_rng([self.seed, 2, task["number"]])
            for sample in samples(name, f"{name}.mp4", events, rng):
                yield RecipeRow(sample | {"source": self.source}, self.split)

    def _probed(self, task: dict[str, Any]) -> tuple[list[ProbedClip], list[Drop]]:
        """Return the clips of a task that can be used, and drops of the others."""
        usable: list[ProbedClip] = []
        drops: list[Drop] = []
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
                need = f"at least {self.seconds[0]} s are needed"
                drops.append(
                    Drop("too_short", clip["where"], f"{clip['path']}: {seconds:.2f} s; {need}")
                )
            else:
                usable.append(ProbedClip(clip, info.duration, info.has_audio))
        return usable, drops

    def _write(
        self, usable: Sequence[ProbedClip], path: Path, drops: list[Drop]
    ) -> list[dict[str, Any]]:
        """Write a video, and return its events with their times in seconds of the video.

        Clips that cannot be decoded are added to the drops.
        """
        events: list[dict[str, Any]] = []
        width, height = self.size
        rate = self.rate if any(probed.has_audio for probed in usable) else None
        with Mp4Writer(path, fps=self.fps, width=width, height=height, rate=rate) as out:
            for probed in usable:
                clip = probed.clip
                cut = self.cut(clip, probed.duration)
                try:
                    frames, sound = self._read(clip["path"], cut, out.frames)
                except MediaError as error:
                    drops.append(unusable(error, clip["where"]))
                    continue
                start = out.frames / self.fps
                out.add(fitted(frames, width, height), sound if rate is not None else None)
                event = {
                    "start": start,
                    "end": out.frames / self.fps,
                    "caption": clip["caption"],
                    "clip": clip["id"],
                    "taken": [round(cut.start, 6), round(cut.end(self.fps), 6)],
                    "speed": cut.speed,
                    "sound": probed.has_audio,
                    "licence": clip["licence"],
                }
                events.append(event)
        return events

    def cut(self, clip: dict[str, Any], duration: float) -> Cut:
        """Return where a clip is cut, from the random numbers of its task.

        Args:
            clip: of a task.
            duration: seconds of its file.
        """
        shortest, longest = self.seconds
        slowest, fastest = self.speeds
        begin = clip["start"] or 0.0
        available = min(clip["end"] or duration, duration) - begin
        length_draw, place_draw, speed_draw = clip["draws"]
        seconds = shortest + length_draw * (min(longest, available) - shortest)
        speed = round(slowest * (fastest / slowest) ** speed_draw, 4)
        frames = max(1, int(seconds / speed * self.fps + 1e-6))
        room = max(0.0, available - frames / self.fps * speed)
        return Cut(begin + place_draw * room, speed, frames)

    def _read(self, path: str, cut: Cut, at: int) -> tuple[np.ndarray, np.ndarray]:
        """Return frames ``(T, H, W, 3)``, and exactly the samples ``(S,)`` that belong to them.

        Args:
            path: of the clip.
            cut: the interval, whose frames are ``T``.
            at: frame of the video at which they begin.
        """
        sampling = Sampling(num_frames=cut.frames, short_side=min(self.size))
        decoded = load_video(
            path, start=cut.start, end=cut.end(self.fps), sampling=sampling, rate=self.rate
        )
        first_sample = round(at / self.fps * self.rate)
        length = round((at + cut.frames) / self.fps * self.rate) - first_sample
        sound = np.zeros(length, np.float32)
        if decoded.sound is not None:
            delay = round(decoded.sound.start * self.rate)
            x = np.pad(decoded.sound.x.numpy(), (delay, 0))
            sound = faster(x, self.rate, cut.speed, length)
        assert decoded.frames is not None
        return decoded.frames.x.numpy(), sound


def samples(
    name: str, path: str, events: list[dict[str, Any]], rng: np.random.Generator
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a video: all events, each event's times, and what is between two times."""
    shared = licences([event["licence"] for event in events])
    listed = [without_licence(event) for event in events]
    lines = say_events([((event["start"], event["end"]), event["caption"]) for event in events])

    def row(tag: str, kind: str, question: str, answer: str, **meta: Any) -> dict[str, Any]:
        content = [{"type": "video", "video": path}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        return {
            "id": f"{name}-{tag}",
            "kind": kind,
            "messages": messages,
            "meta": {"video": name, **meta},
            **shared,
        }

    yield row("dense", "dense_caption", str(rng.choice(DENSE)), lines, events=listed)
    for number, event in enumerate(events):
        start = event["start"]
        end = event["end"]
        question = str(rng.choice(GROUNDING)).format(clause(event["caption"]))
        answer = say_spans([(start, end)])
        yield row(f"when-{number}", "grounding", question, answer, start=start, end=end)
        question = str(rng.choice(SEGMENT)).format(say_span((start, end)))
        answer = sentence(event["caption"])
        yield row(f"what-{number}", "segment", question, answer, start=start, end=end)


def without_licence(event: dict[str, Any]) -> dict[str, Any]:
    """Return an event as rows list it; the licence is a field of the row."""
    return {key: value for key, value in event.items() if key != "licence"}


def check_options(job: PuValor) -> None:
    """Refuse options that no video can have.

    Raises:
        RecipeError: ``bad_range``, ``odd_size`` or ``bad_rate``.
    """
    ranges = {"clips": job.segments, "seconds": job.seconds, "speed": job.speeds}
    for what, (low, high) in ranges.items():
        if not 0 < low <= high:
            raise RecipeError(
                f"{what}: at least {low} and at most {high}; expected 0 < at least <= at most",
                reason="bad_range",
            )
    width, height = job.size
    if width % 2 or height % 2:
        raise RecipeError(
            f"a picture of {width}x{height}; H.264 needs even numbers", reason="odd_size"
        )
    if job.rate not in AAC_RATES:
        rates = ", ".join(map(str, AAC_RATES))
        raise RecipeError(f"{job.rate} samples a second; AAC has {rates}", reason="bad_rate")


def rows(
    source: Path,
    *,
    output: Path,
    manifest: making.ManifestName = "train.jsonl",
    seed: making.Seed = 0,
    cluster_size: Annotated[
        int, typer.Option(min=2, help="Clips in a cluster of similar captions, about.")
    ] = 50,
    fewest: Annotated[int, typer.Option(min=2, help="Clips in a video, at least.")] = 2,
    most: Annotated[int, typer.Option(min=2, help="Clips in a video, at most.")] = 5,
    shortest: Annotated[float, typer.Option(help="Seconds of a clip, at least.")] = 2.0,
    longest: Annotated[float, typer.Option(help="Seconds of a clip, at most.")] = 10.0,
    slowest: Annotated[float, typer.Option(min=0.5, help="Speed of a clip, at least.")] = 0.8,
    fastest: Annotated[float, typer.Option(max=4.0, help="Speed of a clip, at most.")] = 1.25,
    fps: Annotated[
        int, typer.Option(min=1, help="Frames a second; with 10 the times in texts are exact.")
    ] = 10,
    width: Annotated[
        int, typer.Option(min=16, help="Pixels; clips keep their aspect, the rest is black.")
    ] = 480,
    height: Annotated[int, typer.Option(min=16, help="Pixels.")] = 270,
    rate: Annotated[int, typer.Option(help="Samples a second.")] = 32_000,
    embeddings: Annotated[
        str, typer.Option(help="A .npy of one vector a manifest row, instead of TF-IDF.")
    ] = "",
    split: making.SplitName = "train",
    set_name: making.SetName = "",
    engine: making.Engine = "local",
    workers: making.Workers = 1,
    shard_size: making.ShardSize = 32,
) -> Iterator[RecipeRow | Drop]:
    """Make the videos, and yield their rows."""
    job = PuValor(
        manifest=(source / manifest).resolve(),
        seed=seed,
        cluster_size=cluster_size,
        segments=(fewest, most),
        seconds=(shortest, longest),
        speeds=(slowest, fastest),
        fps=fps,
        size=(width, height),
        rate=rate,
        embeddings=Path(embeddings).resolve() if embeddings else None,
        split=split,
    )
    check_options(job)
    job = making.named(job, set_name, "pu")
    yield from making.make(job, output, engine=engine, workers=workers, shard_size=shard_size)


if __name__ == "__main__":
    recipe.main(ABOUT, rows)
