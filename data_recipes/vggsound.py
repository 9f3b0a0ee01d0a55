"""Turn VGGSound (ten seconds of YouTube, 309 classes of sounds) into questions.

    python data_recipes/vggsound.py SOURCE --output DIR [--media audio] [--choices]

`vggsound.csv` has no header: YouTube id, start in seconds, label, train or test
(https://www.robots.ox.ac.uk/~vgg/data/vggsound). Clips are `<YouTube id>_<start, six digits>.mp4`;
the archives that are passed on unpack to
`scratch/shared/beegfs/hchen/train_data/VGGSound_final/video`, and clips are found in any folder,
also where starts are written without leading zeros.
Paper: H. Chen et al., VGGSound: A Large-scale Audio-Visual Dataset, ICASSP 2020, arXiv:2004.14368.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from avllm.recipes import frame as recipe
from avllm.recipes.frame import Dataset, Drop, RecipeRow, Record, caption_samples, read_csv, rows_of
from avllm.recipes.media import VideoFolder, Videos, vggsound_names

ABOUT = Dataset(
    title="VGGSound",
    licence="CC BY 4.0; videos: of their YouTube authors",
    size="199,467 clips of 10 s, 309 classes, 550 hours",
    where="https://www.robots.ox.ac.uk/~vgg/data/vggsound (vggsound.csv); clips from YouTube",
    layout="""
        vggsound.csv  YouTube id, start, label, split; no header
        [video/  <YouTube id>_000030.mp4, in any folder]
    """,
    citation="Chen et al., VGGSound, ICASSP 2020, arXiv:2004.14368",
)
COLUMNS = ("youtube_id", "start", "label", "split")


Media = Literal["video", "audio"]
"""The clip with its sound, or its sound alone."""


def rows(
    source: Path,
    videos: VideoFolder = ".",
    media: Annotated[Media, typer.Option(help="Show the clip, or only play its sound.")] = "video",
    choices: Annotated[
        bool, typer.Option("--choices", help="Name all classes in each test row (7 kB a row).")
    ] = False,
) -> Iterator[RecipeRow | Drop]:
    """Yield one row a clip; the answer is its label."""
    table = source / "vggsound.csv"
    clips = Videos(source, videos)
    classes = class_names(table) if choices else []
    build = partial(clip_row, clips=clips, media=media, classes=classes)
    yield from rows_of(read_csv(table, COLUMNS, header=False), build)


def class_names(table: Path) -> list[str]:
    """Return all labels of the table, sorted."""
    records = read_csv(table, COLUMNS, header=False)
    return sorted({record.text("label") for record in records if not record.problem})


def clip_row(record: Record, clips: Videos, media: Media, classes: list[str]) -> RecipeRow | Drop:
    """Return the row of one clip, or why it is left out."""
    split = record.text("split")
    label = record.text("label")
    if split not in ("train", "test") or not label:
        return Drop("malformed_row", record.where, f"split {split!r}, label {label!r}")
    clip = f"{record.text('youtube_id')}_{int(record.number('start')):06d}"
    part = clips.part(*vggsound_names(clip), kind=media)
    (sample,) = caption_samples(f"vggsound-{clip}", part, [label], split == "train", about="label")
    closed = {"choices": classes} if classes and split == "test" else {}
    return RecipeRow(sample | closed | {"meta": {"label": label}}, split)


if __name__ == "__main__":
    recipe.main(ABOUT, rows)
