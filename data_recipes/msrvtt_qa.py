"""Turn MSRVTT-QA (one-word questions that were generated from MSR-VTT's captions) into manifests.

    python data_recipes/msrvtt_qa.py SOURCE --output DIR [--videos FOLDER]

`train_qa.json`, `val_qa.json` and `test_qa.json` are lists; the first row of val_qa.json is
`{"answer": "couch", "category_id": 14, "id": 158581, "question": "what are three people sitting
on?", "video_id": 6513}`. Ids are counted on from file to file; the video of id 6513 is
`video6513.mp4` (https://github.com/xudejing/video-question-answering, README and
preprocess_msrvttqa.py; the authors' archive has a folder video/, Microsoft's has TrainValVideo/ and
TestVideo/). The five types of the paper follow from the first word: what, who, how, when, where.
Questions are machine-made, many are not grammatical, and answers have typing errors
('coversation'). The authors train on the thousand most frequent answers; here all are kept.
Paper: D. Xu et al., Video Question Answering via Gradually Refined Attention over Appearance and
Motion, ACM Multimedia 2017.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from avllm.recipes import frame as recipe
from avllm.recipes.frame import Dataset, Drop, RecipeRow, Record, read_json, rows_of
from avllm.recipes.media import VideoFolder, Videos
from avllm.recipes.questions import named_splits, question_sample, split_files

ABOUT = Dataset(
    title="MSRVTT-QA",
    licence="none is stated for the questions (code: MIT); videos: MSR-VTT's terms, research only",
    size="158,581 / 12,278 / 72,821 questions about 10,000 clips, 41 hours",
    where="https://github.com/xudejing/video-question-answering; videos: MSR-VTT",
    layout="""
        train_qa.json | val_qa.json | test_qa.json  those that are there
        [video/  video<id>.mp4, in any folder]
    """,
    citation="Xu et al., Video Question Answering via Gradually Refined Attention, ACM Multimedia "
    "2017",
)
FILES = named_splits("*_qa.json")
KINDS = ("what", "who", "how", "when", "where")


def rows(source: Path, videos: VideoFolder = ".") -> Iterator[RecipeRow | Drop]:
    """Yield one row a question."""
    clips = Videos(source, videos)
    for split, path in split_files(source, FILES):
        yield from rows_of(read_json(path), partial(build, split=split, clips=clips))


def build(record: Record, split: str, clips: Videos) -> RecipeRow:
    """Return the row of one question."""
    question = record.text("question")
    video = record.text("video_id")
    first = question.partition(" ")[0].lower()
    sample = question_sample(
        f"msrvtt-qa-{record.text('id')}",
        clips.part(f"video{video}"),
        question,
        record.text("answer"),
        kind=first if first in KINDS else "other",
    )
    return RecipeRow(sample, split)


if __name__ == "__main__":
    recipe.main(ABOUT, rows)
