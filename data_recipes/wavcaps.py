"""Turn WavCaps (sounds captioned by a language model from their descriptions) into captions.

    python data_recipes/wavcaps.py SOURCE --output DIR [--exclude all_ac] [--max-seconds 60]

Layout of https://huggingface.co/datasets/cvssp/WavCaps: `json_files/<source>/*_final.json`, objects
of `{"num_captions_per_audio": 1, "data": [{"id", "caption", "duration", ...}]}`, and FLAC files
whose archives unpack to `mnt/fast/.../<source>_flac/<id>.flac`, wherever that was done. AudioSet's
ids end in `.wav`, the files do not. FreeSound holds sounds of hours. `json_files/blacklist/` names
ids that are also in AudioCaps, Clotho, ESC-50, UrbanSound8K or VGGSound; by default those of
AudioCaps' and Clotho's test sets are left out. Paper: X. Mei et al., WavCaps, TASLP 2024,
arXiv:2303.17395.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from avllm.recipes import frame as recipe
from avllm.recipes.frame import (
    Dataset,
    Drop,
    RecipeError,
    RecipeRow,
    Record,
    caption_samples,
    files_by_stem,
    read_json,
    rows_of,
)

ABOUT = Dataset(
    title="WavCaps",
    licence="academic use only; sounds: Freesound by clip, BBC RemArc, SoundBible by clip, YouTube",
    size="403,050 sounds, 7,568 hours, 770 GB unpacked",
    where="https://huggingface.co/datasets/cvssp/WavCaps: json_files, and Zip_files joined and "
    "unpacked",
    layout="""
        json_files/*/*_final.json  AudioSet_SL/as_, BBC_Sound_Effects/bbc_, FreeSound/fsd_, SoundBible/sb_final.json
        [json_files/blacklist/  blacklist_exclude_*.json]
        [AudioSet_SL_flac/  <id>.flac; and BBC_Sound_Effects_flac, FreeSound_flac, SoundBible_flac, at any depth]
    """,
    citation="Mei et al., WavCaps, TASLP 2024, arXiv:2303.17395",
)
SOURCES = {
    "AudioSet_SL": "as_final.json",
    "BBC_Sound_Effects": "bbc_final.json",
    "FreeSound": "fsd_final.json",
    "SoundBible": "sb_final.json",
}
BLACKLIST_KEYS = {"AudioSet_SL": "AudioSet"}


Exclude = Literal["none", "test_ac", "all_ac", "ub8k_esc50_vggsound"]
"""Blacklists of the authors that leave sounds out."""


def rows(
    source: Path,
    exclude: Annotated[
        Exclude,
        typer.Option(
            help="Leave out what is in the test sets, or all, of AudioCaps and Clotho, ..."
        ),
    ] = "test_ac",
    max_seconds: Annotated[
        float, typer.Option(help="Leave out longer sounds; the longest lasts 12 hours.")
    ] = 300.0,
) -> Iterator[RecipeRow | Drop]:
    """Yield one row a sound."""
    for name, file in SOURCES.items():
        table = source / "json_files" / name / file
        if not table.is_file():
            continue
        listed = blacklist(source, exclude, BLACKLIST_KEYS.get(name, name))
        sounds: dict[str, str] = {}
        for folder in sorted([*source.glob(f"**/{name}_flac"), *source.glob(f"audio/{name}")]):
            sounds.update(files_by_stem(folder, source, (".flac", ".wav")))
        build = partial(sound_row, name=name, sounds=sounds, listed=listed, max_seconds=max_seconds)
        yield from rows_of(read_json(table, "data"), build)


def blacklist(source: Path, exclude: Exclude, key: str) -> set[str]:
    """Return the ids, without suffix, that a blacklist has for a source."""
    if exclude == "none":
        return set()
    path = source / "json_files" / "blacklist" / f"blacklist_exclude_{exclude}.json"
    if not path.is_file():
        raise RecipeError(
            f"{path} is not there; get it with the other json files, or choose --exclude none",
            reason="no_blacklist",
        )
    for record in read_json(path):
        if record.key == key:
            return {stem(str(name)) for name in record["value"]}
    return set()


def stem(name: str) -> str:
    """Return an id without the suffix that AudioSet's have."""
    return name.removesuffix(".wav").removesuffix(".flac")


def sound_row(
    record: Record, name: str, sounds: dict[str, str], listed: set[str], max_seconds: float
) -> RecipeRow | Drop:
    """Return a sound's row, or why it is left out."""
    sound = stem(record.text("id"))
    caption = record.text("caption")
    seconds = record.number("duration")
    if sound in listed:
        return Drop("blacklisted", record.where, f"{name} {sound}")
    if not caption:
        return Drop("empty_caption", record.where, f"{name} {sound}")
    if seconds > max_seconds:
        return Drop("too_long", record.where, f"{name} {sound}: {seconds:g} s")
    part = {"type": "audio", "audio": sounds.get(sound, f"{name}_flac/{sound}.flac")}
    (sample,) = caption_samples(f"wavcaps-{name}-{sound}", part, [caption], True)
    return RecipeRow(sample | {"meta": {"part": name, "duration": seconds}})


if __name__ == "__main__":
    recipe.main(ABOUT, rows)
