"""Turn AVSD (dialogues about Charades videos and their sound, of DSTC7) into manifests.

    python data_recipes/avsd.py SOURCE --output DIR [--videos FOLDER] [--caption]

`train_set4DSTC7-AVSD.json`, `valid_set4DSTC7-AVSD.json` and `test_set4DSTC7-AVSD.json` hold
`{"dialogs": [{"image_id": "YSE1G", "caption", "summary", "dialog": [{"question", "answer"},
...]}]}`; texts are lower-case, with spaces around punctuation. (The README writes val_set; that
name is read, too. The prototype's videoDial_*_v01.json has another form.) Dialogues of the test set
end earlier, and their last answer is `__UNDISCLOSED__`: the one that systems had to give.
`lbl_test_set4DSTC7-AVSD.json` has it and is taken where it is there, else those rows are dropped. A
row is a dialogue, so an evaluation asks its last question after the true history, which is DSTC7's
protocol (https://github.com/hudaAlamri/DSTC7-Audio-Visual-Scene-Aware-Dialog-AVSD-Challenge, README
and Data/README.md). Videos are Charades' (test: Charades_vu17_test), named by `image_id`, in any
folder.
Paper: H. Alamri et al., Audio-Visual Scene-Aware Dialog, CVPR 2019, arXiv:1901.09107.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from avllm.data.schema import RowError
from avllm.recipes import frame as recipe
from avllm.recipes.conversations import question_messages
from avllm.recipes.frame import Dataset, Drop, RecipeRow, Record, read_json, rows_of
from avllm.recipes.media import VideoFolder, Videos
from avllm.recipes.questions import split_files, texts_of

ABOUT = Dataset(
    title="AVSD (DSTC7)",
    licence="MIT (the challenge's repository); videos: Charades' licence, non-commercial",
    size="7,659 / 1,787 / 1,710 dialogues of ten questions (test: of four, on average); Charades "
    "at 480p: 16 GB",
    where="https://github.com/hudaAlamri/DSTC7-Audio-Visual-Scene-Aware-Dialog-AVSD-Challenge; "
    "videos from https://prior.allenai.org/projects/charades",
    layout="""
        *_set4DSTC7-AVSD.json  train_, valid_, test_ or lbl_test_: those that are there
        [Charades_v1_480/  YSE1G.mp4, in any folder; of the test set: Charades_vu17_test]
    """,
    citation="Alamri et al., Audio-Visual Scene-Aware Dialog, CVPR 2019, arXiv:1901.09107",
)
FILES = {
    "train": ("train_set4DSTC7-AVSD.json",),
    "validation": ("valid_set4DSTC7-AVSD.json", "val_set4DSTC7-AVSD.json"),
    "test": ("lbl_test_set4DSTC7-AVSD.json", "test_set4DSTC7-AVSD.json"),
}
HIDDEN = "__UNDISCLOSED__"


def rows(
    source: Path,
    videos: VideoFolder = ".",
    caption: Annotated[
        bool, typer.Option("--caption", help="Put the video's caption before the dialogue.")
    ] = False,
) -> Iterator[RecipeRow | Drop]:
    """Yield one row a dialogue."""
    clips = Videos(source, videos)
    for split, path in split_files(source, FILES):
        yield from rows_of(
            read_json(path, "dialogs"),
            partial(build, split=split, clips=clips, show_caption=caption),
        )


def build(record: Record, split: str, clips: Videos, show_caption: bool) -> RecipeRow:
    """Return the row of one dialogue."""
    video = record.text("image_id")
    caption = record.text("caption")
    pairs = [texts_of(turn, record.where, "question", "answer") for turn in record.array("dialog")]
    if any(answer == HIDDEN for _, answer in pairs):
        raise RowError(
            "undisclosed_answer", f"{video}: the answer is in lbl_test_set4DSTC7-AVSD.json"
        )
    if show_caption and not caption:
        raise RowError("no_caption", f"{video} has no caption")
    if show_caption and pairs:
        pairs[0][0] = f"{caption}\n{pairs[0][0]}"
    sample: dict[str, Any] = {
        "id": f"avsd-{video}",
        "messages": question_messages([clips.part(video)], pairs),
    }
    return RecipeRow(sample | {"kind": "dialogue", "meta": {"caption": caption}}, split)


if __name__ == "__main__":
    recipe.main(ABOUT, rows)
