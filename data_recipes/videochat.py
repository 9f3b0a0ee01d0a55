"""VideoChat-11K (7K detailed descriptions and 4K conversations about WebVid clips) -> manifests.

    python data_recipes/videochat.py SOURCE --output DIR [--videos FOLDER]

videochat_instruct_11k.json is a list of `{"video": "<WebVid folder>/<WebVid id>.mp4", "QA": [{"q", "a"}, ...]}`
(https://github.com/OpenGVLab/InternVideo/tree/main/Data/instruction_data; its reader is
https://github.com/OpenGVLab/Ask-Anything/blob/main/video_chat/dataset/it_dataset.py). In the copy that belongs to
VideoChat2-IT a pair has an instruction `i`, too, and `q` may be empty: then the instruction is the question. WebVid is
no longer handed out by its authors; clips are looked for by their ids, in any folder.
Paper: K. Li et al., VideoChat: Chat-Centric Video Understanding, arXiv:2305.06355.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from avllm.data import recipe
from avllm.data.conversations import question_messages
from avllm.data.recipe import Dataset, Drop, Record, Row, read_json, rows_of
from avllm.data.recipe_media import VideoFolder, Videos
from avllm.data.recipe_questions import texts_of

ABOUT = Dataset(
    title="VideoChat-11K",
    licence="none is stated for the conversations (made with ChatGPT); clips: WebVid's terms, research only",
    size="11K conversations about 8K clips",
    where="https://github.com/OpenGVLab/InternVideo/tree/main/Data/instruction_data; clips from WebVid-10M",
    layout="""
        videochat_instruct_11k.json  the conversations
        [videos/  <id>.mp4, in any folder]
    """,
    citation="Li et al., VideoChat: Chat-Centric Video Understanding, arXiv:2305.06355",
)


def rows(source: Path, videos: VideoFolder = ".") -> Iterator[Row | Drop]:
    """One row a conversation."""
    clips = Videos(source, videos)
    yield from rows_of(read_json(source / "videochat_instruct_11k.json"), partial(build, clips=clips))


def build(record: Record, clips: Videos) -> Row:
    """The row of one conversation."""
    clip = Path(record.text("video")).stem
    pairs = [pair(turn, record.where) for turn in record.array("QA")]
    return Row({"id": f"videochat-{clip}", "messages": question_messages([clips.part(clip)], pairs)})


def pair(turn: Any, where: str) -> tuple[str, str]:
    """(question, answer); an instruction stands in front of its question."""
    instruction, question, answer = texts_of(turn, where, "i", "q", "a")
    return "\n".join(filter(None, (instruction, question))), answer


if __name__ == "__main__":
    recipe.main(ABOUT, rows)
