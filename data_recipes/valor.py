"""VALOR-32K and VALOR-1M (ten seconds of YouTube, sight and sound captioned together) -> captions.

    python data_recipes/valor.py SOURCE --output DIR [--train FILE]

The annotations are `desc_train.json`, `desc_val.json` and `desc_test.json`, lists of `{"video_id", "desc"}`
(https://casia-iva-group.github.io/projects/VALOR/download.html; the copy that comes with VAST names the field
`caption`). A video_id is `<YouTube id>_<start>_<end>` in seconds, and the id itself may hold underscores. Clips stand
in `raw_videos/<video_id>.mp4`, as the authors' README (https://github.com/TXH-mercury/VALOR) has it; where only the
whole video `<YouTube id>.mp4` is there, the row names the interval of it. For VALOR-1M give its file with `--train`.
Paper: S. Chen et al., VALOR: Vision-Audio-Language Omni-Perception Pretraining Model and Dataset, arXiv:2304.08345.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from avllm.data import recipe
from avllm.data.recipe import Dataset, Drop, Record, Row, caption_samples, files_by_stem, read_json, rows_of

ABOUT = Dataset(
    title="VALOR-32K, VALOR-1M",
    licence="annotations: research only; videos: of their YouTube authors",
    size="32K or 1M clips of 10 s",
    where="https://casia-iva-group.github.io/projects/VALOR/download.html; clips from YouTube",
    layout="""
        desc_train.json | *.json  video_id, desc
        [desc_val.json  the same]
        [desc_test.json  the same]
        [raw_videos/  <video_id>.mp4, or whole videos <YouTube id>.mp4]
    """,
    citation="Chen et al., VALOR, arXiv:2304.08345",
)
VIDEO_ID = re.compile(r"(.+)_(\d+(?:\.\d+)?)_(\d+(?:\.\d+)?)")
SUFFIXES = (".mp4", ".mkv", ".webm")


def rows(
    source: Path,
    train: Annotated[
        str, typer.Option(help="The training annotations; for VALOR-1M its own file.")
    ] = "desc_train.json",
) -> Iterator[Row | Drop]:
    """One row a caption in training; in validation and test a clip's further captions are accepted answers."""
    files = {train: "train", "desc_val.json": "validation", "desc_test.json": "test"}
    videos = files_by_stem(source, source, SUFFIXES)
    for name, split in files.items():
        if split == "train" or (source / name).is_file():
            yield from rows_of(read_json(source / name), partial(clip_rows, videos=videos, split=split))


def clip_rows(record: Record, videos: dict[str, str], split: str) -> list[Row] | Drop:
    """The rows of one clip, or why it is left out."""
    name = record.text("video_id")
    captions = captions_of(record)
    if not captions:
        return Drop("empty_caption", record.where, name)
    samples = caption_samples(
        f"valor-{name}", video_part(name, videos), captions, split == "train", about="audiovisual"
    )
    return [Row(sample, split) for sample in samples]


def captions_of(record: Record) -> list[str]:
    """The captions: field ``desc`` or ``caption``, one or a list."""
    found = record["caption" if "caption" in record else "desc"]
    return [text.strip() for text in (found if isinstance(found, list) else [found]) if text and text.strip()]


def video_part(name: str, videos: dict[str, str]) -> dict[str, Any]:
    """The clip's own file, else the interval of the whole video, else where the clip should be."""
    pieces = VIDEO_ID.fullmatch(name)
    if name not in videos and pieces and pieces[1] in videos:
        return {"type": "video", "video": videos[pieces[1]], "start": float(pieces[2]), "end": float(pieces[3])}
    return {"type": "video", "video": videos.get(name, f"raw_videos/{name}.mp4")}


if __name__ == "__main__":
    recipe.main(ABOUT, rows)
