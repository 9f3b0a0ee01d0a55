"""Turn ActivityNet-QA (ten human questions about each of 5,800 long videos) into manifests.

    python data_recipes/activitynet_qa.py SOURCE --output DIR [--videos FOLDER]

`dataset/train_q.json` is a list of `{"video_name": "okC18bPTils", "question", "question_id":
"v_okC18bPTils_3"}`, `dataset/train_a.json` one of `{"answer", "type": 3, "question_id"}`; the same
for val and test. Types are 0 motion, 1 spatial relation, 2 temporal relation, and 3 to 8 free
questions by what is answered: yes or no, colour, object, location, number, other
(https://github.com/MILVLG/activitynet-qa, dataset/README.md). `video_name` lacks the `v_` that
ActivityNet's files have, `v_okC18bPTils.mp4` (or .mkv, .webm); both are looked for, in any folder.
Questions are lower-case and have no question mark.
Paper: Z. Yu et al., ActivityNet-QA: A Dataset for Understanding Complex Web Videos via Question
Answering, AAAI 2019, arXiv:1906.02467.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from avllm.data.schema import RowError
from avllm.recipes import frame as recipe
from avllm.recipes.frame import Dataset, Drop, RecipeError, RecipeRow, Record, read_json, rows_of
from avllm.recipes.media import VideoFolder, Videos
from avllm.recipes.questions import named_splits, question_sample, split_files

ABOUT = Dataset(
    title="ActivityNet-QA",
    licence="MIT, non-commercial use only (README; its LICENSE file: Apache-2.0); videos: of "
    "their YouTube authors",
    size="32,000 / 18,000 / 8,000 questions about 5,800 videos of 180 s",
    where="https://github.com/MILVLG/activitynet-qa; videos from http://activity-net.org",
    layout="""
        dataset/*_q.json | *_q.json  questions of train, val, test: those that are there
        dataset/*_a.json | *_a.json  their answers
        [videos/  v_<YouTube id>.mp4, .mkv or .webm, in any folder]
    """,
    citation="Yu et al., ActivityNet-QA, AAAI 2019, arXiv:1906.02467",
)
FILES = named_splits("dataset/*_q.json", "*_q.json")
KINDS = (
    "motion",
    "spatial",
    "temporal",
    "yes_no",
    "colour",
    "object",
    "location",
    "number",
    "other",
)


def rows(source: Path, videos: VideoFolder = ".") -> Iterator[RecipeRow | Drop]:
    """Yield one row a question."""
    clips = Videos(source, videos)
    for split, path in split_files(source, FILES):
        answers = read_answers(path.with_name(path.name.replace("_q.json", "_a.json")))
        yield from rows_of(
            read_json(path), partial(build, split=split, answers=answers, clips=clips)
        )


def read_answers(path: Path) -> dict[str, Record]:
    """Return the answers by the ids of their questions."""
    return {record.text("question_id"): record for record in read_json(path)}


def build(record: Record, split: str, answers: Mapping[str, Record], clips: Videos) -> RecipeRow:
    """Return the row of one question."""
    name = record.text("question_id")
    video = record.text("video_name")
    answer = answers.get(name)
    if answer is None:
        raise RowError("no_answer", f"the file of answers has none to {name}")
    kind = answer.text("type")
    if not kind.isdecimal() or int(kind) >= len(KINDS):
        raise RecipeError(f"{answer.where}: type is {kind!r}; expected 0 to {len(KINDS) - 1}")
    sample = question_sample(
        f"activitynet-qa-{name}",
        clips.part(f"v_{video}", video),
        record.text("question"),
        answer.text("answer"),
        kind=KINDS[int(kind)],
    )
    return RecipeRow(sample, split)


if __name__ == "__main__":
    recipe.main(ABOUT, rows)
