"""Turn VALOR-32K and VALOR-1M (sight and sound of ten seconds captioned together) into captions.

    python data_recipes/valor.py SOURCE --output DIR [--train FILE] [--videos FOLDER]

The annotations are `desc_train.json`, `desc_val.json` and `desc_test.json`, lists of `{"video_id",
"desc"}` (https://casia-iva-group.github.io/projects/VALOR/download.html; copies that name the field
`caption` are read, too). A video_id is `<YouTube id>_<start>_<end>` in seconds,
`Agi5ySKb1tY_23.700_33.700`, and the id itself may hold underscores; a few clips are shorter than
ten seconds. Known defect: of eight clips of VALOR-32K whose start is no whole second the caption
was lost, and a piece of the id is there instead ('700'): such rows, without a word, are dropped.
Clips are in
 `raw_videos/<video_id>.mp4` in the authors' README (https://github.com/TXH-mercury/VALOR),
and are found in any folder; where only the whole video `<YouTube id>.mp4` is there, the row names
the interval of it. For VALOR-1M give its file with `--train`.
Paper: S. Chen et al., VALOR: Vision-Audio-Language Omni-Perception Pretraining Model and Dataset,
arXiv:2304.08345.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from avllm.recipes import frame as recipe
from avllm.recipes.frame import (
    Dataset,
    Drop,
    RecipeRow,
    Record,
    caption_samples,
    read_json,
    rows_of,
)
from avllm.recipes.media import VideoFolder, Videos

ABOUT = Dataset(
    title="VALOR-32K, VALOR-1M",
    licence="none is stated for the annotations (code: MIT); videos: of their YouTube authors",
    size="25,327 / 3,500 / 3,491 or 1M clips of 10 s, with a caption each",
    where="https://casia-iva-group.github.io/projects/VALOR/download.html; clips from YouTube",
    layout="""
        desc_train.json | *.json  video_id, desc
        [desc_val.json  the same]
        [desc_test.json  the same]
        [raw_videos/  <video_id>.mp4, or whole videos <YouTube id>.mp4, in any folder]
    """,
    citation="Chen et al., VALOR, arXiv:2304.08345",
)
VIDEO_ID = re.compile(r"(?P<video>.+)_(?P<start>\d+(?:\.\d+)?)_(?P<end>\d+(?:\.\d+)?)")


def rows(
    source: Path,
    train: Annotated[
        str, typer.Option(help="The training annotations; for VALOR-1M its own file.")
    ] = "desc_train.json",
    videos: VideoFolder = ".",
) -> Iterator[RecipeRow | Drop]:
    """Yield one row a caption in training, and one a clip with further answers elsewhere."""
    files = {train: "train", "desc_val.json": "validation", "desc_test.json": "test"}
    clips = Videos(source, videos)
    for name, split in files.items():
        if split == "train" or (source / name).is_file():
            yield from rows_of(
                read_json(source / name), partial(clip_rows, clips=clips, split=split)
            )


def clip_rows(record: Record, clips: Videos, split: str) -> list[RecipeRow] | Drop:
    """Return the rows of one clip, or why it is left out."""
    name = record.text("video_id")
    texts = captions_of(record)
    captions = [text for text in texts if has_letter(text)]
    if not texts:
        return Drop("empty_caption", record.where, name)
    if not captions:
        return Drop("no_words", record.where, f"{name}: {', '.join(texts)}")
    samples = caption_samples(
        f"valor-{name}", video_part(name, clips), captions, split == "train", about="audiovisual"
    )
    return [RecipeRow(sample, split) for sample in samples]


def has_letter(text: str) -> bool:
    """Return whether a caption has a letter: lost captions are numbers."""
    return any(character.isalpha() for character in text)


def captions_of(record: Record) -> list[str]:
    """Return the captions: field ``desc`` or ``caption``, one or a list."""
    field = "caption" if "caption" in record else "desc"
    texts = record[field]
    if not isinstance(texts, list):
        texts = [texts]
    return [text.strip() for text in texts if text and text.strip()]


def video_part(name: str, clips: Videos) -> dict[str, Any]:
    """Return the part of the clip's own file, else of the interval of the whole video.

    Where neither is there, the part names the clip's file, which the frame reports as missing.
    """
    match = VIDEO_ID.fullmatch(name)
    if name not in clips.path_by_stem and match and match["video"] in clips.path_by_stem:
        interval = {"start": float(match["start"]), "end": float(match["end"])}
        return clips.part(match["video"]) | interval
    return clips.part(name)


if __name__ == "__main__":
    recipe.main(ABOUT, rows)
