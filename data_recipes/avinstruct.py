r"""Turn AVinstruct (instructions about picture and sound of videos) into manifests.

    python data_recipes/avinstruct.py SOURCE --output DIR [--videos FOLDER]

avqa_data1.json and avqa_data2.json are lists of `{"video_id": "00005580", "multi_choice",
"correct_answer", "video": "/mnt/.../00005580.npy", "audio": "/mnt/.../00005580.mp3.npy",
"conversations": [{"from": "human", "value": "Summarize the video to help answer:\n<Q>How many
instruments are sounding in the video?<Q>\n<video>"}, {"from": "gpt", ...}]}`
(https://github.com/rikeilong/Bay-CAT/tree/main/AVinstruct). `video` and `audio` are features on the
authors' machine. The video is the file named `video_id`, or else as the features are (AVQA's are
VGGSound's clips, found with and without leading zeros in their starts); its own sound is the audio,
so that one `<video>` stands for both. `<Q>` encloses the question for CAT's clue aggregator; the
marks are taken out.
Paper: Q. Ye et al., CAT: Enhancing Multimodal Large Language Model to Answer Questions in Dynamic
Audio-Visual Scenarios, ECCV 2024, arXiv:2403.04640.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from avllm.recipes import frame as recipe
from avllm.recipes.conversations import chat_messages
from avllm.recipes.frame import Dataset, Drop, RecipeRow, Record, read_json, rows_of
from avllm.recipes.media import VideoFolder, Videos, vggsound_names

ABOUT = Dataset(
    title="AVinstruct",
    licence="none is stated for the conversations (code: Apache-2.0); videos: as in MUSIC-AVQA "
    "and AVQA",
    size="not stated; two files, on the videos of MUSIC-AVQA and AVQA",
    where="https://github.com/rikeilong/Bay-CAT/tree/main/AVinstruct; videos as for MUSIC-AVQA "
    "and AVQA",
    layout="""
        avqa_data*.json | AVinstruct/avqa_data*.json  the conversations
        [videos/  <video_id>.mp4, in any folder]
    """,
    citation="Ye et al., CAT, ECCV 2024, arXiv:2403.04640",
)
QUESTION_MARK = "<Q>"


def rows(source: Path, videos: VideoFolder = ".") -> Iterator[RecipeRow | Drop]:
    """Yield one row a conversation."""
    clips = Videos(source, videos)
    for path in sorted(
        [*source.glob("avqa_data*.json"), *source.glob("AVinstruct/avqa_data*.json")]
    ):
        yield from rows_of(read_json(path), partial(build, clips=clips))


def build(record: Record, clips: Videos) -> RecipeRow:
    """Return the row of one conversation."""
    video = record.text("video_id")
    turns = [without_marks(turn) for turn in record.array("conversations")]
    names = [*vggsound_names(video), *vggsound_names(Path(str(record.get("video"))).stem)]
    part = clips.part(*names)
    return RecipeRow(
        {"id": f"avinstruct-{video}", "messages": chat_messages(turns, {"video": [part]})}
    )


def without_marks(turn: Any) -> Any:
    """Return the turn without `<Q>`."""
    if isinstance(turn, dict) and isinstance(turn.get("value"), str):
        return turn | {"value": turn["value"].replace(QUESTION_MARK, "")}
    return turn


if __name__ == "__main__":
    recipe.main(ABOUT, rows)
