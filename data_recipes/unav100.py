"""Turn UnAV-100 (events that are both seen and heard, and their times) into manifests.

    python data_recipes/unav100.py SOURCE --output DIR [--no-dense] [--no-grounding]

`annotations/unav100_annotations.json` is `{"database": {"__2MwJ2uHu0": {"subset": "train",
"duration": 60.0, "annotations": [{"label": "dog barking", "label_id": 11, "segment": [2.1, 8.4]},
...]}}}`; subsets are train, validation and test, times are seconds of the clip that
scripts/video_download.py cuts, raw_videos/<YouTube id>.mp4. Events overlap, and a label occurs
several times in a video (https://github.com/ttgeng233/UnAV, libs/datasets/unav100.py).

A video gives a row with all of its events (kind `dense`) and one for each label, with all of its
intervals (kind `grounding`); a row is dropped where one of its intervals cannot be, as an answer
with the rest would be wrong. An end that exceeds the clip's by no more than --overrun is the
clip's end, and the row keeps what was annotated in `meta.annotated`.
Paper: T. Geng et al., Dense-Localizing Audio-Visual Events in Untrimmed Videos, CVPR 2023,
arXiv:2303.12930.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from avllm.data.schema import RowError
from avllm.recipes import frame as recipe
from avllm.recipes.captions import wording
from avllm.recipes.frame import (
    Dataset,
    Drop,
    RecipeError,
    RecipeRow,
    Record,
    first_file,
    read_json,
    rows_of,
)
from avllm.recipes.media import VideoFolder, Videos
from avllm.recipes.questions import question_sample, when_question
from avllm.recipes.timespans import Span, checked_span, say_events, say_spans

ABOUT = Dataset(
    title="UnAV-100",
    licence="CC BY 4.0 (annotations; code: MIT); videos: of their YouTube authors",
    size="30,059 events of 100 classes in 10,790 videos, 126 hours",
    where="https://unav100.github.io or https://huggingface.co/datasets/ttgeng233/UnAV-100",
    layout="""
        annotations/unav100_annotations.json | unav100_annotations.json  the events
        [raw_videos/  <YouTube id>.mp4, in any folder]
    """,
    citation="Geng et al., Dense-Localizing Audio-Visual Events in Untrimmed Videos, CVPR 2023, "
    "arXiv:2303.12930",
)
FILES = ("annotations/unav100_annotations.json", "unav100_annotations.json")
SPLITS = ("train", "validation", "test")
DENSE = (
    "Which events can be both seen and heard in this video? "
    "Say for each from which second to which.",
    "List what happens in the picture and the sound, with start and end in seconds.",
    "What are the audio-visual events of the video, and when do they take place? "
    "Answer in seconds.",
)
Event = tuple[Span, str]
Checked = Callable[[float, float], Span]


def rows(
    source: Path,
    videos: VideoFolder = ".",
    dense: Annotated[bool, typer.Option(help="A row with all events of a video.")] = True,
    grounding: Annotated[bool, typer.Option(help="A row for each label of a video.")] = True,
    overrun: Annotated[
        float, typer.Option(min=0, help="Seconds that an event may exceed its video.")
    ] = 1.0,
) -> Iterator[RecipeRow | Drop]:
    """Yield rows of all videos."""
    clips = Videos(source, videos)
    for record in read_json(source / first_file(source, FILES), "database"):
        asked = [""] if dense else []
        if grounding:
            asked += labels(record)
        yield from rows_of(
            (
                Record(record | {"label": label}, where(record, label), record.key)
                for label in asked
            ),
            partial(build, clips=clips, overrun=overrun),
        )


def where(record: Record, label: str) -> str:
    """Return the place that a drop names."""
    return f"{record.where} {label}".strip()


def labels(record: Record) -> list[str]:
    """Return the labels of a video's events, each once, in order; malformed events have none."""
    events = record.get("annotations")
    if not isinstance(events, list):
        return []
    names = [event.get("label") for event in events if isinstance(event, dict)]
    return list(dict.fromkeys(name for name in names if isinstance(name, str)))


def build(record: Record, clips: Videos, overrun: float) -> RecipeRow:
    """Return the row of a video's events, or of those with the record's label."""
    video = record.key
    split = record.text("subset").lower()
    label = record.text("label")
    if split not in SPLITS:
        raise RowError("unknown_subset", f"{video}: subset {split!r}; expected {', '.join(SPLITS)}")
    duration = record.number("duration")
    annotated = [event for event in read_events(record) if label in ("", event[1])]
    events = [(checked_span(*span, duration, overrun), name) for span, name in annotated]
    if not events:
        raise RowError("no_events", f"{video} has no event")
    meta: dict[str, Any] = {"duration": duration, "spans": [span for span, _ in events]}
    if not label:
        meta["labels"] = [name for _, name in events]
    if events != annotated:
        meta["annotated"] = [span for span, _ in annotated]
    name = f"unav100-{video}"
    if label:
        name += f"-{label.replace(' ', '_').replace(',', '')}"
    key = name if split == "train" else None
    if label:
        kind = "grounding"
        question, answer = grounding_pair(label, events, key)
    else:
        kind = "dense"
        question, answer = dense_pair(events, key)
    sample = question_sample(name, clips.part(video), question, answer, kind=kind, meta=meta)
    return RecipeRow(sample, split)


def read_events(record: Record) -> list[Event]:
    """Return the events as they are annotated.

    Raises:
        RecipeError: an event is no label and two numbers.
    """
    return [read_event(event, record.where) for event in record.array("annotations")]


def read_event(event: Any, where: str) -> Event:
    """Return one event; see :func:`read_events`."""
    fields = event if isinstance(event, dict) else {}
    label = fields.get("label")
    segment = fields.get("segment")
    numbers = isinstance(segment, list) and [type(x) in (int, float) for x in segment]
    if numbers != [True, True] or not isinstance(label, str) or not label.strip():
        raise RecipeError(
            f"{where}: {str(event)[:80]}; expected a label and a segment of two numbers"
        )
    start, end = segment
    return (float(start), float(end)), label.strip()


def grounding_pair(label: str, events: Sequence[Event], key: str | None) -> tuple[str, str]:
    """Return the question when an event takes place, and its intervals."""
    return when_question(label, key), say_spans(span for span, _ in events)


def dense_pair(events: Sequence[Event], key: str | None) -> tuple[str, str]:
    """Return the question which events take place, and all events with their intervals."""
    question = DENSE[0] if key is None else wording(DENSE, key)
    return question, say_events(events)


if __name__ == "__main__":
    recipe.main(ABOUT, rows)
