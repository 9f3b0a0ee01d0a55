"""Turn VideoChat-11K (7K descriptions and 4K conversations about WebVid clips) into manifests.

    python data_recipes/videochat.py SOURCE --output DIR [--videos FOLDER]

videochat_instruct_11k.json is a list of `{"video": "000001_000050/1066682446.mp4", "QA": [{"q",
"a"}, ...]}`; a file is named by folder and id of WebVid-10M
(https://github.com/OpenGVLab/InternVideo/tree/main/Data/instruction_data; reader:
https://github.com/OpenGVLab/Ask-Anything/blob/main/video_chat/dataset/it_dataset.py). VideoChat2-IT
has two files, video/caption/videochat/train.json and video/conversation/videochat1/train.json,
which are read where the one is not there. Their pairs have an instruction `i`, which is given once,
before the conversation; `q` may be empty: then the instruction is the question. A row may name an
interval of its video, `start` and `end`. WebVid is no longer handed out by its authors; clips are
looked for by their ids, in any folder.
Paper: K. Li et al., VideoChat: Chat-Centric Video Understanding, arXiv:2305.06355.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from avllm.recipes import frame as recipe
from avllm.recipes.conversations import question_messages
from avllm.recipes.frame import Dataset, Drop, RecipeRow, Record, read_json, rows_of
from avllm.recipes.media import VideoFolder, Videos
from avllm.recipes.questions import texts_of

ABOUT = Dataset(
    title="VideoChat-11K",
    licence="none is stated for the conversations (VideoChat2-IT: MIT); clips: WebVid's, "
    "non-commercial research",
    size="7K descriptions and 4K conversations",
    where="https://github.com/OpenGVLab/InternVideo/tree/main/Data/instruction_data; clips from "
    "WebVid-10M",
    layout="""
        videochat_instruct_11k.json | video/*/videochat/train.json | video/*/videochat1/train.json  conversations
        [videos/  <id>.mp4, in any folder]
    """,
    citation="Li et al., VideoChat: Chat-Centric Video Understanding, arXiv:2305.06355",
)
FILE = "videochat_instruct_11k.json"
PARTS = ("video/caption/videochat/train.json", "video/conversation/videochat1/train.json")


def rows(source: Path, videos: VideoFolder = ".") -> Iterator[RecipeRow | Drop]:
    """Yield one row a conversation."""
    clips = Videos(source, videos)
    names = [FILE] if (source / FILE).is_file() else present_parts(source)
    for name in names:
        yield from rows_of(read_json(source / name), partial(build, clips=clips))


def present_parts(source: Path) -> list[str]:
    """Return the files of VideoChat2-IT that the source has."""
    return [name for name in PARTS if (source / name).is_file()]


def build(record: Record, clips: Videos) -> RecipeRow:
    """Return the row of one conversation."""
    clip = Path(record.text("video")).stem
    part = clips.part(clip) | {key: record.number(key) for key in ("start", "end") if key in record}
    return RecipeRow(
        {"id": f"videochat-{clip}", "messages": question_messages([part], pairs(record))}
    )


def pairs(record: Record) -> Iterator[tuple[str, str]]:
    """Yield question and answer of each turn.

    An instruction precedes its question, unless the turn before has the same instruction.
    """
    last_instruction = ""
    for turn in record.array("QA"):
        instruction, question, answer = texts_of(turn, record.where, "i", "q", "a")
        if instruction and (instruction != last_instruction or not question):
            text = f"{instruction}\n{question}" if question else instruction
        else:
            text = question
        last_instruction = instruction
        yield text, answer


if __name__ == "__main__":
    recipe.main(ABOUT, rows)
