"""Turn NExT-QA (why, how, before and after in daily life), with choices or open, into manifests.

    python data_recipes/next_qa.py SOURCE --output DIR [--videos FOLDER]

`dataset/nextqa/train.csv`, `val.csv`, `test.csv`. Multiple choice
(https://github.com/doc-doc/NExT-QA): columns video, frame_count, width, height, question, answer (0
to 4), qid, type, a0 to a4. Open-ended (https://github.com/doc-doc/NExT-OE): the same without a0 to
a4, and the answer is a text; `add_reference_answer_test.json`, {video: {qid: answer}}, has a second
answer for half of the test videos, which is accepted, too. The columns of a file show which of the
two it is.
 `map_vid_vidorID.json` gives each video's path in VidOR, {"2909445186": "0101/2909445186"},
after which the authors' NExTVideo archive is nested; it is not needed, since files are found by
their ids in any folder. Types: CW, CH causal (why, how), TN, TP, TC temporal (next, previous,
current), DC, DL, DO, DB descriptive (count, location, other, yes or no); DB is in the open-ended
task alone. Questions are lower-case and have no question mark. Of a handful of rows two choices are
the same text.
Paper: J. Xiao et al., NExT-QA: Next Phase of Question-Answering to Explaining Temporal Actions,
CVPR 2021, arXiv:2105.08276.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from avllm.data.schema import RowError
from avllm.recipes import frame as recipe
from avllm.recipes.frame import Dataset, Drop, RecipeRow, Record, read_csv, read_json, rows_of
from avllm.recipes.media import VideoFolder, Videos
from avllm.recipes.questions import chosen, named_splits, question_sample, split_files, with_choices

ABOUT = Dataset(
    title="NExT-QA (multiple choice, open-ended)",
    licence="MIT; videos: VidOR's (YFCC100M, Creative Commons)",
    size="47,692 questions with choices or 52,044 without about 5,440 videos of 44 s",
    where="https://github.com/doc-doc/NExT-QA or https://github.com/doc-doc/NExT-OE; videos: "
    "NExTVideo.zip there",
    layout="""
        dataset/nextqa/*.csv | *.csv  train.csv, val.csv, test.csv: those that are there
        [dataset/nextqa/add_reference_answer_test.json  second answers, open-ended]
        [NExTVideo/  0101/2909445186.mp4, in any folder]
    """,
    citation="Xiao et al., NExT-QA, CVPR 2021, arXiv:2105.08276",
)
FILES = named_splits("dataset/nextqa/*.csv", "*.csv")
COLUMNS = ("video", "question", "answer", "qid", "type")
CHOICES = ("a0", "a1", "a2", "a3", "a4")
KINDS = {
    "CW": "causal.why",
    "CH": "causal.how",
    "TN": "temporal.next",
    "TP": "temporal.previous",
    "TC": "temporal.current",
    "DC": "descriptive.count",
    "DL": "descriptive.location",
    "DO": "descriptive.other",
    "DB": "descriptive.yes_no",
}


def rows(source: Path, videos: VideoFolder = ".") -> Iterator[RecipeRow | Drop]:
    """Yield one row a question."""
    clips = Videos(source, videos)
    for split, path in split_files(source, FILES):
        further = {}
        if split == "test":
            further = further_answers(path.with_name("add_reference_answer_test.json"))
        yield from rows_of(
            read_csv(path, COLUMNS), partial(build, split=split, clips=clips, further=further)
        )


def further_answers(path: Path) -> dict[str, Mapping[str, Any]]:
    """Return the second answers by video and question; none where the file is absent."""
    if not path.is_file():
        return {}
    return {record.key: record for record in read_json(path)}


def build(
    record: Record, split: str, clips: Videos, further: Mapping[str, Mapping[str, Any]]
) -> RecipeRow:
    """Return the row of one question."""
    video = record.text("video")
    number = record.text("qid")
    kind = record.text("type")
    if kind not in KINDS:
        raise RowError(
            "unknown_type",
            f"question {number} about {video}: type {kind!r}; known: {', '.join(KINDS)}",
        )
    question = record.text("question")
    answer = record.text("answer")
    choices = None
    answers = None
    second = str(further.get(video, {}).get(number, ""))
    if CHOICES[0] in record:
        choices, answer = chosen([record[name] for name in CHOICES], answer)
        question = with_choices(question, choices)
    elif second not in ("", answer):
        answers = [second]
    sample = question_sample(
        f"next-qa-{video}-{number}",
        clips.part(video),
        question,
        answer,
        kind=KINDS[kind],
        choices=choices,
        answers=answers,
    )
    return RecipeRow(sample, split)


if __name__ == "__main__":
    recipe.main(ABOUT, rows)
