"""Turn Charades-STA (when does an event happen in a video of daily life) into manifests.

    python data_recipes/charades_sta.py SOURCE --output DIR [--videos FOLDER] [--overrun SECONDS]

`charades_sta_train.txt` and `charades_sta_test.txt` have one line an event, `3MSZA 24.3
30.4##person turn a light on.`: video, start and end in seconds, sentence
(https://github.com/jiyanggao/TALL). Lengths of the videos are in Charades' own
`Charades_v1_train.csv` and `Charades_v1_test.csv` (columns id, length, ...); without them ends
cannot be checked. Known defects: 1,805 of the 12,408 training events and 562 of the 3,720 test
events exceed their video, by 1.54 s at the most (the makers' advice is to clip them,
https://github.com/gsig/charades-algorithms/issues/5), and start and end of four are exchanged. An
end that exceeds the video's by
 no more than --overrun is the video's end, and the row keeps the
annotated one in `meta.annotated`; all others are dropped. Videos are `3MSZA.mp4` (Charades_v1_480/
or Charades_v1/), in any folder.
Paper: J. Gao et al., TALL: Temporal Activity Localization via Language Query, ICCV 2017,
arXiv:1705.02101.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from avllm.data.schema import RowError
from avllm.recipes import frame as recipe
from avllm.recipes.frame import (
    Dataset,
    Drop,
    RecipeRow,
    Record,
    drops_of,
    open_text,
    read_csv,
    rows_of,
)
from avllm.recipes.media import VideoFolder, Videos
from avllm.recipes.questions import question_sample, split_files, when_question
from avllm.recipes.timespans import checked_span, say_spans

ABOUT = Dataset(
    title="Charades-STA",
    licence="none is stated for the sentences; videos: Charades' licence, non-commercial",
    size="12,408 / 3,720 events in 6,672 videos of 30 s; Charades at 480p: 16 GB",
    where="https://github.com/jiyanggao/TALL; videos and lengths: "
    "https://prior.allenai.org/projects/charades",
    layout="""
        charades_sta_train.txt | charades_sta_test.txt  those that are there
        [Charades_v1_train.csv  lengths of the videos]
        [Charades_v1_test.csv  likewise]
        [Charades_v1_480/  3MSZA.mp4, in any folder]
    """,
    citation="Gao et al., TALL: Temporal Activity Localization via Language Query, ICCV 2017, "
    "arXiv:1705.02101",
)
FILES = {"train": ("charades_sta_train.txt",), "test": ("charades_sta_test.txt",)}
LENGTHS = ("Charades_v1_train.csv", "Charades_v1_test.csv")
LINE = re.compile(
    r"(?P<video>\S+)\s+(?P<start>\d+(?:\.\d+)?)\s+(?P<end>\d+(?:\.\d+)?)\s*##(?P<sentence>.+)"
)


def rows(
    source: Path,
    videos: VideoFolder = ".",
    overrun: Annotated[
        float, typer.Option(min=0, help="Seconds that an event may exceed its video.")
    ] = 2.0,
) -> Iterator[RecipeRow | Drop]:
    """Yield one row an event."""
    clips = Videos(source, videos)
    lengths: dict[str, float] = {}
    yield from read_lengths(source, lengths)
    for split, path in split_files(source, FILES):
        yield from rows_of(
            read_lines(path),
            partial(build, split=split, clips=clips, lengths=lengths, overrun=overrun),
        )


def read_lines(path: Path) -> Iterator[Record]:
    """Yield the lines, as ``{"line": text}``."""
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield Record({"line": line.strip()}, f"{path.name}:{number}")


def read_lengths(source: Path, lengths: dict[str, float]) -> Iterator[RecipeRow | Drop]:
    """Fill in the seconds of videos from Charades' tables, and yield a drop for each bad row."""
    for path in (source / name for name in LENGTHS if (source / name).is_file()):
        table = read_csv(path, ("id", "length"))

        def read(record: Record) -> None:
            lengths[record.text("id")] = record.number("length")

        yield from drops_of(table, read)


def build(
    record: Record, split: str, clips: Videos, lengths: Mapping[str, float], overrun: float
) -> RecipeRow:
    """Return the row of one event."""
    match = LINE.fullmatch(record.text("line"))
    if match is None:
        raise RowError(
            "malformed_line", f"{record.text('line')!r}; expected 'VIDEO START END##SENTENCE'"
        )
    video = match["video"]
    sentence = match["sentence"].strip()
    annotated = float(match["start"]), float(match["end"])
    span = checked_span(*annotated, lengths.get(video), overrun)
    name = f"charades-sta-{split}-{record.where.rpartition(':')[2]}"
    meta: dict[str, Any] = {"spans": [span]}
    if video in lengths:
        meta["duration"] = lengths[video]
    if span != annotated:
        meta["annotated"] = [annotated]
    sample = question_sample(
        name,
        clips.part(video),
        when_question(sentence, name if split == "train" else None),
        say_spans([span]),
        kind="grounding",
        meta=meta,
    )
    return RecipeRow(sample, split)


if __name__ == "__main__":
    recipe.main(ABOUT, rows)
