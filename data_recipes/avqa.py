"""Turn AVQA (questions with four choices about picture and sound of VGGSound clips) into manifests.

    python data_recipes/avqa.py SOURCE --output DIR [--videos FOLDER]

`data/annotation/train_qa.json` and `val_qa.json` are lists of `{"id": 183, "video_name":
"-HG3Omg_89c_000030", "video_id": 341, "question_text": "What happened in the video?",
"multi_choice": ["motorboat", "Yacht consignment", "Sailboat set sail", "Consignment car"],
"answer": 1, "question_relation": "View", "question_type": "Happening"}`; `answer` counts from 0,
the relation is Both, Sound or View, the type one of eight (https://github.com/AlyssaYoung/AVQA,
data/ and preprocess/preprocess_text/datautils/avqa.py, which fills choices that are null or absent
with 'NULL'; here such rows are dropped). Clips are VGGSound's, `-HG3Omg_89c_000030.mp4`; copies
that write the start as `_30` are found, too, in any folder. There is no test split.
Paper: P. Yang et al., AVQA: A Dataset for Audio-Visual Question Answering on Videos, ACM Multimedia
2022.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from avllm.recipes import frame as recipe
from avllm.recipes.frame import Dataset, Drop, RecipeRow, Record, read_json, rows_of
from avllm.recipes.media import VideoFolder, Videos, vggsound_names
from avllm.recipes.questions import chosen, named_splits, question_sample, split_files, with_choices

ABOUT = Dataset(
    title="AVQA",
    licence="none is stated for the questions; clips: VGGSound's (CC BY 4.0), of their YouTube "
    "authors",
    size="40,425 / 16,910 questions about 57,015 clips of 10 s",
    where="https://mn.cs.tsinghua.edu.cn/avqa (questions: https://github.com/AlyssaYoung/AVQA); "
    "clips: VGGSound",
    layout="""
        data/annotation/*_qa.json | *_qa.json  questions of train and val
        [data/video/  <YouTube id>_000030.mp4, in any folder]
    """,
    citation="Yang et al., AVQA, ACM Multimedia 2022",
)
FILES = named_splits("data/annotation/*_qa.json", "*_qa.json")
CHOICES = 4


def rows(source: Path, videos: VideoFolder = ".") -> Iterator[RecipeRow | Drop]:
    """Yield one row a question."""
    clips = Videos(source, videos)
    for split, path in split_files(source, FILES):
        yield from rows_of(read_json(path), partial(build, split=split, clips=clips))


def build(record: Record, split: str, clips: Videos) -> RecipeRow:
    """Return the row of one question."""
    listed = record.array("multi_choice")
    choices, answer = chosen([*listed, *[None] * (CHOICES - len(listed))], record["answer"])
    kind = f"{record.text('question_relation')}.{record.text('question_type')}".lower().replace(
        " ", "_"
    )
    sample = question_sample(
        f"avqa-{record.text('id')}",
        clips.part(*vggsound_names(record.text("video_name"))),
        with_choices(record.text("question_text"), choices),
        answer,
        kind=kind,
        choices=choices,
    )
    return RecipeRow(sample, split)


if __name__ == "__main__":
    recipe.main(ABOUT, rows)
