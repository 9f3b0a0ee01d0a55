"""Turn WebVid-2M and WebVid-10M (stock footage with its title) into captions.

    python data_recipes/webvid.py SOURCE --output DIR [--subset 10M]

Columns `videoid, contentUrl, duration, page_dir, name` and the folders
`videos/<page_dir>/<videoid>.mp4` are those of the authors' README and download.py
(https://github.com/m-bain/webvid). Rows without a page_dir have no place in the folders and are
left out, as their download.py does. Copies of 10M come in parts, `data/train/partitions/0000.csv`.
The clips have no sound track. Paper: M. Bain et al., Frozen in Time: A Joint Video and Image
Encoder for End-to-End Retrieval, ICCV 2021, arXiv:2104.00650.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from avllm.recipes import frame as recipe
from avllm.recipes.frame import (
    SPLITS,
    Dataset,
    Drop,
    RecipeError,
    RecipeRow,
    Record,
    caption_samples,
    first_file,
    read_csv,
    rows_of,
)

ABOUT = Dataset(
    title="WebVid",
    licence="the authors' terms: non-commercial research, for 12 months at a time; clips: of the "
    "footage's owner",
    size="2.5M or 10.7M clips, 13,000 or 52,000 hours",
    where="https://github.com/m-bain/webvid (withdrawn by its authors in February 2024)",
    layout="""
        results_*_train.csv | metadata/results_*_train.csv | data/train/partitions/*.csv  videoid, ..., page_dir, name
        [results_*_val.csv  the same]
        [videos/*/*.mp4 | */*.mp4  <page_dir>/<videoid>.mp4]
    """,
    citation="Bain et al., Frozen in Time, ICCV 2021, arXiv:2104.00650",
)
COLUMNS = ("videoid", "page_dir", "name")


def rows(
    source: Path,
    subset: Annotated[
        str, typer.Option(help="2M or 10M: results_<subset>_train.csv and _val.csv.")
    ] = "2M",
) -> Iterator[RecipeRow | Drop]:
    """Yield one row a clip."""
    for name, split in SPLITS.items():
        for table in tables(source, subset, name, required=split == "train"):
            yield from rows_of(
                read_csv(table, COLUMNS), partial(clip_row, source=source, split=split)
            )


def tables(source: Path, subset: str, name: str, required: bool) -> list[Path]:
    """Return the table of a split, or its parts as the copies of 10M have it.

    Raises:
        RecipeError: it is required and not there.
    """
    file = f"results_{subset}_{name}.csv"
    whole = [path for path in (source / file, source / "metadata" / file) if path.is_file()]
    paths = whole[:1] or sorted((source / "data" / name / "partitions").glob("*.csv"))
    if required and not paths:
        raise RecipeError(
            f"{source} has no {file}, metadata/{file} or data/{name}/partitions; choose --subset",
            reason="no_table",
        )
    return paths


def clip_row(record: Record, source: Path, split: str) -> RecipeRow | Drop:
    """Return the row of one clip, or why it is left out."""
    video = record.text("videoid")
    page = record.text("page_dir")
    caption = record.text("name")
    if not page:
        return Drop("no_page_dir", record.where, video)
    if not caption:
        return Drop("empty_caption", record.where, video)
    path = first_file(source, (f"videos/{page}/{video}.mp4", f"{page}/{video}.mp4"))
    (sample,) = caption_samples(
        f"webvid-{video}", {"type": "video", "video": path}, [caption], split == "train"
    )
    return RecipeRow(sample, split)


if __name__ == "__main__":
    recipe.main(ABOUT, rows)
