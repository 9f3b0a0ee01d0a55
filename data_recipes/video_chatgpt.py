"""Turn Video-ChatGPT's VideoInstruct-100K (questions about ActivityNet) into manifests.

    python data_recipes/video_chatgpt.py SOURCE --output DIR [--videos FOLDER]

One JSON list of `{"q", "a", "video_id": "v_k_ZXmr8pmrs"}`: VideoInstruct_Dataset.json on the
authors' drive, VideoInstruct100K.json on Hugging Face. `video_id` has no suffix, and ActivityNet's
files are mp4, mkv or webm; they are looked for by name, in any folder. A video has about eight
questions, each of which is a row (https://github.com/mbzuai-oryx/Video-ChatGPT,
docs/train_video_chatgpt.md and scripts/convert_instruction_json_to_training_format.py; there every
other row has its video after the question, here all have it in front).
Paper: M. Maaz et al., Video-ChatGPT: Towards Detailed Video Understanding via Large Vision and
Language Models, ACL 2024, arXiv:2306.05424.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from avllm.recipes import frame as recipe
from avllm.recipes.frame import Dataset, Drop, RecipeRow, Record, first_file, read_json, rows_of
from avllm.recipes.media import VideoFolder, Videos
from avllm.recipes.questions import question_sample

ABOUT = Dataset(
    title="Video-ChatGPT (VideoInstruct-100K)",
    licence="CC BY-SA 4.0 (Hugging Face) or CC BY-NC-SA 4.0 (the repository); videos: of their "
    "YouTube authors",
    size="100,010 questions about 13,303 videos",
    where="https://huggingface.co/datasets/MBZUAI/VideoInstruct-100K; videos from "
    "http://activity-net.org",
    layout="""
        VideoInstruct100K.json | VideoInstruct_Dataset.json  questions and answers
        [videos/  v_<YouTube id>.mp4, .mkv or .webm, in any folder]
    """,
    citation="Maaz et al., Video-ChatGPT, ACL 2024, arXiv:2306.05424",
)
FILES = ("VideoInstruct100K.json", "VideoInstruct_Dataset.json")


def rows(source: Path, videos: VideoFolder = ".") -> Iterator[RecipeRow | Drop]:
    """Yield one row a question."""
    records = read_json(source / first_file(source, FILES))
    counts: Counter[str] = Counter()
    yield from rows_of(records, partial(build, clips=Videos(source, videos), counts=counts))


def build(record: Record, clips: Videos, counts: Counter[str]) -> RecipeRow:
    """Return the row of one question.

    Its id is the video's and the number of the question about it, from 0, which ``counts`` holds.
    """
    video = record.text("video_id")
    name = f"video-chatgpt-{video}-{counts[video]}"
    counts[video] += 1
    return RecipeRow(question_sample(name, clips.part(video), record.text("q"), record.text("a")))


if __name__ == "__main__":
    recipe.main(ABOUT, rows)
