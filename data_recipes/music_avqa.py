"""Turn MUSIC-AVQA (templated questions about musical performances) into manifests.

    python data_recipes/music_avqa.py SOURCE --output DIR [--videos FOLDER]

`data/json_update/avqa-train.json`, `avqa-val.json`, `avqa-test.json` are lists of `{"video_id":
"00000108", "question_id": 10, "type": '["Audio", "Comparative"]', "question_content": "Is the
<Object> louder than the <Object>?", "templ_values": '["guzheng", "piano"]', "question_deleted": 0,
"anser": "yes"}`. The slots `<Object>`, `<LR>`, `<FL>`, `<TH>`, `<LRer>`, `<LL>`, `<BA>` are filled
with `templ_values` in order; it and `type` are JSON inside JSON, and `anser` is spelled so
(https://github.com/GeWu-Lab/MUSIC-AVQA, data/json_update, net_grd_avst/dataloader_avst.py).

Quirks: one template ends in a full-width question mark, some end in a space (both are made plain);
instruments are written `acoustic_guitar` (here with a space, in questions and answers). In the
older data/json, which is read where json_update is not there, some questions occur twice with
different answers: both are dropped. Videos are `00000108.mp4`, made ones `sa00008442.mp4`, `va...`,
`vv...`, `ev...`, `es...`, in any folder. Rows of validation and test name the closed set of 42
answers as their choices.
Paper: G. Li et al., Learning to Answer Questions in Dynamic Audio-Visual Scenarios, CVPR 2022,
arXiv:2203.14072.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from avllm.data.schema import RowError
from avllm.recipes import frame as recipe
from avllm.recipes.frame import Dataset, Drop, RecipeError, RecipeRow, Record, read_json, rows_of
from avllm.recipes.media import VideoFolder, Videos
from avllm.recipes.questions import named_splits, question_sample, split_files

ABOUT = Dataset(
    title="MUSIC-AVQA",
    licence="CC BY-NC 4.0; videos: of their YouTube authors",
    size="45,867 questions about 9,288 videos of 60 s; 48 GB",
    where="https://gewu-lab.github.io/MUSIC-AVQA (questions: "
    "https://github.com/GeWu-Lab/MUSIC-AVQA)",
    layout="""
        data/json_update/avqa-*.json | data/json/avqa-*.json | avqa-*.json  questions of train, val, test
        [data/video/  00000108.mp4, in any folder]
    """,
    citation="Li et al., Learning to Answer Questions in Dynamic Audio-Visual Scenarios, CVPR "
    "2022, arXiv:2203.14072",
)
FILES = named_splits("data/json_update/avqa-*.json", "data/json/avqa-*.json", "avqa-*.json")
SLOT = re.compile(r"<[A-Za-z]+>")
COUNTS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "more than ten",
]
PLACES = ["indoor", "outdoor", "left", "middle", "right", "simultaneously"]
INSTRUMENTS = (
    "accordion acoustic_guitar bagpipe banjo bassoon cello clarinet congas drum electric_bass erhu "
    "flute guzheng piano pipa saxophone suona trumpet tuba ukulele violin xylophone"
)
ANSWERS = ["yes", "no", *COUNTS, *PLACES, *(name.replace("_", " ") for name in INSTRUMENTS.split())]


def rows(source: Path, videos: VideoFolder = ".") -> Iterator[RecipeRow | Drop]:
    """Yield one row a question."""
    clips = Videos(source, videos)
    for split, path in split_files(source, FILES):
        twice = contradicted(path)
        yield from rows_of(read_json(path), partial(build, split=split, clips=clips, twice=twice))


def contradicted(path: Path) -> set[str]:
    """Return the ids of questions that the file has with different answers."""
    first: dict[str, Any] = {}
    ids = set()
    for record in read_json(path):
        name = str(record.get("question_id")).strip()
        answer = record.get("anser")
        if first.setdefault(name, answer) != answer:
            ids.add(name)
    return ids


def build(record: Record, split: str, clips: Videos, twice: Collection[str]) -> RecipeRow:
    """Return the row of one question."""
    name = record.text("question_id")
    video = record.text("video_id")
    answer = record.text("anser").replace("_", " ")
    if record.text("question_deleted") not in ("", "0"):
        raise RowError("deleted_by_authors", f"question {name}")
    if name in twice:
        raise RowError(
            "contradictory_answers",
            f"question {name} about {video} has different answers",
        )
    if answer and answer not in ANSWERS:
        raise RowError(
            "unknown_answer", f"question {name}: {answer!r} is none of the {len(ANSWERS)} answers"
        )
    sample = question_sample(
        f"music-avqa-{name}",
        clips.part(video),
        filled(record),
        answer,
        kind=".".join(listed(record, "type")).lower(),
        choices=None if split == "train" else ANSWERS,
    )
    return RecipeRow(sample, split)


def filled(record: Record) -> str:
    """Return the question with its slots filled."""
    template = record.text("question_content")
    values = listed(record, "templ_values")
    slots = SLOT.findall(template)
    if len(slots) != len(values):
        raise RowError(
            "slot_mismatch", f"{template!r} has {len(slots)} slots; the values are {values}"
        )
    given = iter(values)
    text = SLOT.sub(lambda _: next(given).replace("_", " "), template)
    return text.replace("\N{FULLWIDTH QUESTION MARK}", "?")


def listed(record: Record, field: str) -> list[str]:
    """Return a list of texts that is written as JSON inside the JSON.

    Raises:
        RecipeError: it is something else.
    """
    try:
        value = json.loads(record.text(field))
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise RecipeError(
            f"{record.where}: field {field!r} is {record[field]!r}; "
            "expected a list of texts, as JSON"
        )
    return value


if __name__ == "__main__":
    recipe.main(ABOUT, rows)
