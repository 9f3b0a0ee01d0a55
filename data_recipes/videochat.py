"""VideoChat-11K (7K detailed descriptions and 4K conversations about WebVid clips) -> manifests.

    python data_recipes/videochat.py SOURCE --output DIR [--videos FOLDER]

videochat_instruct_11k.json is a list of `{"video": "000001_000050/1066682446.mp4", "QA": [{"q", "a"}, ...]}`; a file is
named by folder and id of WebVid-10M (https://github.com/OpenGVLab/InternVideo/tree/main/Data/instruction_data; reader:
https://github.com/OpenGVLab/Ask-Anything/blob/main/video_chat/dataset/it_dataset.py). VideoChat2-IT has two files,
video/caption/videochat/train.json and video/conversation/videochat1/train.json, which are read where the one is not
there. Their pairs have an instruction `i`, which is told once, before the conversation; `q` may be empty: then the
instruction is the question. A row may name an interval of its video, `start` and `end`. WebVid is no longer handed out
by its authors; clips are looked for by their ids, in any folder.
Paper: K. Li et al., VideoChat: Chat-Centric Video Understanding, arXiv:2305.06355.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from avllm.recipes import frame as recipe
from avllm.recipes.conversations import question_messages
from avllm.recipes.frame import Dataset, Drop, Record, Row, read_json, rows_of
from avllm.recipes.media import VideoFolder, Videos
from avllm.recipes.questions import texts_of

ABOUT = Dataset(
    title="VideoChat-11K",
    licence="none is stated for the conversations (VideoChat2-IT: MIT); clips: WebVid's, non-commercial research",
    size="7K descriptions and 4K conversations",
    where="https://github.com/OpenGVLab/InternVideo/tree/main/Data/instruction_data; clips from WebVid-10M",
    layout="""
        videochat_instruct_11k.json | video/*/videochat/train.json | video/*/videochat1/train.json  conversations
        [videos/  <id>.mp4, in any folder]
    """,
    citation="Li et al., VideoChat: Chat-Centric Video Understanding, arXiv:2305.06355",
)
FILE = "videochat_instruct_11k.json"
PARTS = ("video/caption/videochat/train.json", "video/conversation/videochat1/train.json")


def rows(source: Path, videos: VideoFolder = ".") -> Iterator[Row | Drop]:
    """One row a conversation."""
    clips = Videos(source, videos)
    names = [FILE] if (source / FILE).is_file() else [name for name in PARTS if (source / name).is_file()]
    for name in names:
        yield from rows_of(read_json(source / name), partial(build, clips=clips))


def build(record: Record, clips: Videos) -> Row:
    """The row of one conversation."""
    clip = Path(record.text("video")).stem
    part = clips.part(clip) | {key: record.number(key) for key in ("start", "end") if key in record}
    return Row({"id": f"videochat-{clip}", "messages": question_messages([part], pairs(record))})


def pairs(record: Record) -> Iterator[tuple[str, str]]:
    """(question, answer) of each turn; an instruction stands in front of its question, once where all turns have it."""
    told = ""
    for turn in record.array("QA"):
        instruction, question, answer = texts_of(turn, record.where, "i", "q", "a")
        new = "" if question and instruction == told else instruction
        told = instruction
        yield "\n".join(filter(None, (new, question))), answer


if __name__ == "__main__":
    recipe.main(ABOUT, rows)
