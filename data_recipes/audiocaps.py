"""Turn AudioCaps 1 and 2 (captioned ten-second sounds of AudioSet) into captions.

    python data_recipes/audiocaps.py SOURCE --output DIR

The authors (https://github.com/cdjkim/audiocaps, dataset/ and dataset2.0/) give train.csv, val.csv
and test.csv with `audiocap_id, youtube_id, start_time, caption`, and no sounds. Copies of the
sounds differ in folders, formats and names; the ones in use are `Y<youtube_id>`, `<youtube_id>`,
`<youtube_id>_<start_time>`, `<audiocap_id>` and `Y<youtube_id>_<start>.000_<end>.000`, and all are
found. Two quirks: the five captions of a validation or
test clip are far apart, and in 2.0's
train.csv a few captions are broken over two lines without quotes (its issues 23 and 31): those are
joined again. Paper: C. D. Kim et al., AudioCaps: Generating Captions for Audios in The Wild, NAACL
2019.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from avllm.recipes import frame as recipe
from avllm.recipes.frame import (
    SPLITS,
    Dataset,
    Drop,
    RecipeRow,
    Record,
    caption_samples,
    files_by_stem,
    first_file,
    read_csv,
)
from avllm.recipes.media import SOUND_FILES

ABOUT = Dataset(
    title="AudioCaps",
    licence="captions: academic use only (README; its LICENSE file: MIT); sounds: of their "
    "YouTube authors",
    size="51,308 clips of 10 s and 57,188 captions (2.0: 92,726 and 98,606)",
    where="https://github.com/cdjkim/audiocaps (dataset/ or dataset2.0/); sounds from YouTube or "
    "with AudioSet",
    layout="""
        train.csv | dataset*/train.csv | csv_files_v*/train.csv  audiocap_id, youtube_id, start_time, caption
        [val.csv  the same, five captions a clip]
        [test.csv  the same, five captions a clip]
        [*/  sounds, in any folder]
    """,
    citation="Kim et al., AudioCaps, NAACL 2019",
)
COLUMNS = ("audiocap_id", "youtube_id", "start_time", "caption")
FOLDERS = {"1": ("dataset", "csv_files_v1", ""), "2": ("dataset2.0", "csv_files_v2", "")}
SECONDS = 10


def rows(
    source: Path,
    version: Annotated[
        Literal["1", "2"], typer.Option(help="Of the two in the authors' repository.")
    ] = "1",
) -> Iterator[RecipeRow | Drop]:
    """Yield one row a caption in training, and one row a clip with five captions elsewhere."""
    sounds = files_by_stem(source, source, (*SOUND_FILES, ".mp4"))
    folder = (
        source / first_file(source, [f"{name}/train.csv".lstrip("/") for name in FOLDERS[version]])
    ).parent
    for name, split in SPLITS.items():
        table = folder / f"{name}.csv"
        if split != "train" and not table.is_file():
            continue
        clips: dict[str, list[Record]] = {}
        for record in whole_rows(table):
            if isinstance(record, Drop):
                yield record
            elif split == "train":
                yield from clip_rows(
                    f"audiocaps-{record.text('audiocap_id')}", [record], sounds, split
                )
            else:
                clips.setdefault(f"audiocaps-{record.text('youtube_id')}", []).append(record)
        for clip, records in clips.items():
            yield from clip_rows(clip, records, sounds, split)


def whole_rows(table: Path) -> Iterator[Record | Drop]:
    """Yield the rows of a table; a caption that is broken over lines is joined again."""
    last: Record | None = None  # its caption may go on in the next line
    for record in read_csv(table, COLUMNS):
        if last is not None and not record["audiocap_id"].isdigit():
            rest = ",".join([*record.values(), *record.surplus])
            last["caption"] = f"{last['caption']} {rest}"
            continue
        if last is not None:
            yield last
        last = None
        if record.problem or not record.text("start_time").isdigit():
            yield Drop(
                "malformed_row",
                record.where,
                record.problem or "start_time is no number of seconds",
            )
        elif not record.text("caption"):
            yield Drop("empty_caption", record.where, record.text("youtube_id"))
        else:
            last = record
    if last is not None:
        yield last


def clip_rows(
    name: str, records: list[Record], sounds: dict[str, str], split: str
) -> Iterator[RecipeRow]:
    """Yield the rows of one clip."""
    captions = [record.text("caption") for record in records]
    part = {"type": "audio", "audio": sound_of(records[0], sounds)}
    meta: dict[str, Any] = {key: records[0].text(key) for key in ("youtube_id", "start_time")}
    for sample in caption_samples(name, part, captions, split == "train"):
        yield RecipeRow(sample | {"meta": meta}, split)


def sound_of(record: Record, sounds: dict[str, str]) -> str:
    """Return the clip's file under one of the names in use, else the name that it should have."""
    video = record.text("youtube_id")
    start = int(record.text("start_time"))
    spans = [f"{video}_{start}.000_{start + SECONDS}.000", f"{video}_{start}"]
    stems = [
        f"Y{video}",
        video,
        *spans,
        *(f"Y{span}" for span in spans),
        record.text("audiocap_id"),
    ]
    return next((sounds[stem] for stem in stems if stem in sounds), f"audio/Y{video}.wav")


if __name__ == "__main__":
    recipe.main(ABOUT, rows)
