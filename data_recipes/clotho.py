"""Turn Clotho 2.1 (sounds of Freesound, five captions each) into captions.

    python data_recipes/clotho.py SOURCE --output DIR

For each of the splits development, validation and evaluation the authors
(https://zenodo.org/records/4783391) give `clotho_captions_<split>.csv` (`file_name, caption_1 ...
caption_5`), `clotho_metadata_<split>.csv` (with the licence of each sound; in ISO-8859-1, the
captions are in UTF-8) and an archive of WAV files that unpacks to a folder with the split's name.
Paper: K. Drossos et al., Clotho: an Audio Captioning Dataset, ICASSP 2020, arXiv:1910.09387.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from avllm.recipes import frame as recipe
from avllm.recipes.frame import (
    Dataset,
    Drop,
    RecipeRow,
    Record,
    caption_samples,
    drops_of,
    first_file,
    read_csv,
    rows_of,
)

ABOUT = Dataset(
    title="Clotho 2.1",
    licence="captions: Tampere University, non-commercial with attribution; sounds: Creative "
    "Commons, by clip",
    size="5,929 sounds of 15 to 30 s, 29,645 captions, 8 GB",
    where="https://zenodo.org/records/4783391: the csv files, and the 7z archives unpacked",
    layout="""
        clotho_captions_development.csv | clotho_csv_files/clotho_captions_development.csv  file_name, caption_1 ...
        [clotho_captions_validation.csv  the same; and _evaluation.csv]
        [clotho_metadata_development.csv  file_name, ..., license; and _validation.csv, _evaluation.csv]
        [development/  *.wav; or clotho_audio_development/; and validation/, evaluation/]
    """,
    citation="Drossos et al., Clotho, ICASSP 2020, arXiv:1910.09387",
)
SPLITS = {"development": "train", "validation": "validation", "evaluation": "test"}
FOLDERS = ("", "clotho_audio_", "clotho_audio_files/")
CAPTIONS = tuple(f"caption_{number}" for number in range(1, 6))


def rows(source: Path) -> Iterator[RecipeRow | Drop]:
    """Yield five rows a sound in training, and one with further answers in the other splits."""
    for name, split in SPLITS.items():
        table = table_of(source, f"clotho_captions_{name}.csv")
        if split == "train" or table.is_file():
            yield from split_rows(source, table, name, split)


def table_of(source: Path, name: str) -> Path:
    """Return a table, in the source or where loaders put it."""
    return source / first_file(source, (name, f"clotho_csv_files/{name}"))


def read_licences(source: Path, name: str, licences: dict[str, str]) -> Iterator[RecipeRow | Drop]:
    """Fill in the licences by file name, and yield a drop for each row that cannot be read.

    Nothing is filled in where the metadata were not fetched.
    """
    table = table_of(source, f"clotho_metadata_{name}.csv")
    if table.is_file():
        records = read_csv(table, ("file_name", "license"), encoding="iso-8859-1")

        def read(record: Record) -> None:
            licences[record["file_name"]] = record.text("license")

        yield from drops_of(records, read)


def split_rows(source: Path, table: Path, name: str, split: str) -> Iterator[RecipeRow | Drop]:
    """Yield the rows of one split."""
    licence: dict[str, str] = {}
    yield from read_licences(source, name, licence)
    build = partial(sound_rows, source=source, name=name, split=split, licence=licence)
    yield from rows_of(read_csv(table, ("file_name", *CAPTIONS)), build)


def sound_rows(
    record: Record, source: Path, name: str, split: str, licence: dict[str, str]
) -> list[RecipeRow] | Drop:
    """Return the rows of one sound, or why it is left out."""
    file = record["file_name"]  # unchanged, spaces included
    captions = [text for key in CAPTIONS if (text := record.text(key))]
    if not captions:
        return Drop("empty_caption", record.where, file)
    path = first_file(source, [f"{folder}{name}/{file}" for folder in FOLDERS])
    own = {"licence": licence[file]} if licence.get(file) else {}
    sample_id = f"clotho-{name}-{Path(file).stem.strip()}"
    samples = caption_samples(
        sample_id, {"type": "audio", "audio": path}, captions, split == "train"
    )
    return [RecipeRow(sample | own, split) for sample in samples]


if __name__ == "__main__":
    recipe.main(ABOUT, rows)
