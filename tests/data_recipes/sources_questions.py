"""Question and grounding sets in their authors' layout, a few rows each: a function a recipe."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_recipes.sources_captions import touch, write_csv, write_json


def msrvtt_qa(source: Path) -> None:
    """Two splits; a question that is none of the five types; one without answer."""

    def row(number: int, video: int, question: str, answer: str) -> dict[str, Any]:
        return {
            "answer": answer,
            "category_id": 14,
            "id": number,
            "question": question,
            "video_id": video,
        }

    rows = [
        row(158581, 6513, "what are three people sitting on?", "couch"),
        row(158582, 6513, "which couple sits on a couch?", "family"),
        row(158583, 6513, "who is sitting?", ""),
    ]
    test = [row(170859, 7010, "where is a cat?", "nan"), row(170860, 7010, "who plays?", "cat")]
    write_json(source / "val_qa.json", rows)
    write_json(source / "test_qa.json", test)
    touch(source, "TrainValVideo/video6513.mp4", "TestVideo/video7010.mp4")


def activitynet_qa(source: Path) -> None:
    """Questions and answers in different order; an id with dashes; a question without answer."""
    names = ["okC18bPTils", "-_x9aaa-bbb"]
    asked = [
        {
            "video_name": names[0],
            "question": "are all the people in the video men",
            "question_id": f"v_{names[0]}_3",
        },
        {
            "video_name": names[1],
            "question": "what happened before skiing",
            "question_id": f"v_{names[1]}_2",
        },
        {
            "video_name": names[1],
            "question": "what color is the dog",
            "question_id": f"v_{names[1]}_9",
        },
    ]
    answers = [
        {"answer": "put on shoes", "type": 2, "question_id": f"v_{names[1]}_2"},
        {"answer": "no", "type": 3, "question_id": f"v_{names[0]}_3"},
    ]
    write_json(source / "dataset/val_q.json", asked)
    write_json(source / "dataset/val_a.json", answers)
    touch(source, f"videos/v_{names[0]}.mkv", f"videos/{names[1]}.mp4")


def music_row(
    number: int, video: str, template: str, values: list[str], answer: str, **more: Any
) -> dict[str, Any]:
    """A question of MUSIC-AVQA."""
    row = {
        "video_id": video,
        "question_id": number,
        "type": json.dumps(["Audio-Visual", "Counting"]),
        "question_content": template,
        "templ_values": json.dumps(values),
        "question_deleted": 0,
        "anser": answer,
    }
    return row | more


def music_avqa(source: Path) -> None:
    """Slots, a full-width question mark, an instrument of two words; every kind of bad row."""
    train = [
        music_row(
            10,
            "00000108",
            "Is the <Object> louder than the <Object>?",
            ["guzheng", "acoustic_guitar"],
            "yes",
        ),
        music_row(
            31, "00000108", "How many sounding <Object> in the video\uff1f", ["banjo"], "one"
        ),
        music_row(32, "00000108", "Is the <Object> louder than the <Object>?", ["guzheng"], "yes"),
        music_row(33, "00000108", "Is there a voiceover?", [], "yes", question_deleted=1),
        music_row(34, "00000108", "Is there a voiceover?", [], "perhaps"),
        music_row(35, "00000108", "How many sounding <Object> in the video?", ["banjo"], "two"),
        music_row(35, "00000108", "How many sounding <Object> in the video?", ["banjo"], "four"),
    ]
    test = [
        music_row(
            7,
            "sa00008442",
            "What kind of instrument is the <LRer> instrument? ",
            ["leftest"],
            "electric_bass",
        )
    ]
    write_json(source / "data/json_update/avqa-train.json", train)
    write_json(source / "data/json_update/avqa-test.json", test)
    write_json(
        source / "data/json/avqa-val.json",
        [music_row(9, "00000108", "Where is the performance?", [], "indoor")],
    )
    touch(source, "data/video/00000108.mp4", "synthetic/sa00008442.mp4")


def avqa(source: Path) -> None:
    """A copy with another form of its start; a choice that is null or absent, a wrong index."""

    def row(number: int, choices: Sequence[Any], answer: int) -> dict[str, Any]:
        return {
            "id": number,
            "video_name": "-HG3Omg_89c_000030",
            "video_id": 341,
            "question_text": "What happened in the video?",
            "multi_choice": list(choices),
            "answer": answer,
            "question_relation": "View",
            "question_type": "Come From",
        }

    choices = ["motorboat", "Yacht consignment", "Sailboat set sail", "Consignment car"]
    bad = [row(184, [*choices[:3], None], 1), row(185, choices[:3], 1), row(186, choices, 4)]
    write_json(source / "data/annotation/train_qa.json", [row(183, choices, 1), *bad])
    touch(source, "data/video/-HG3Omg_89c_30.mp4")


def next_qa(source: Path) -> None:
    """Training rows with choices, test rows without; a second answer; unknown type and index."""
    columns = ["video", "frame_count", "width", "height", "question", "answer", "qid", "type"]
    choices = [
        "roll the handle",
        "tap their feet",
        "strum the string",
        "hit with sticks",
        "pat with hand",
    ]
    clip = ["4010069381", 369, 640, 480]
    rows = [
        [*clip, "how do the two man play the instrument", 2, 6, "CH", *choices],
        [*clip, "why did he, the boy, move", 5, 7, "CW", *choices],
        [*clip, "what is this", 1, 8, "XX", *choices],
    ]
    write_csv(
        source / "dataset/nextqa/train.csv", [[*columns, "a0", "a1", "a2", "a3", "a4"], *rows]
    )
    asked = [
        ["5772591393", 1, 2, 3, "where is this", "house", 2, "DL"],
        ["5772591393", 1, 2, 3, "what does the cat do", "turn its head", 1, "TN"],
    ]
    write_csv(source / "dataset/nextqa/test.csv", [columns, *asked])
    second = {"5772591393": {"2": "home", "1": "turn its head"}}
    write_json(source / "dataset/nextqa/add_reference_answer_test.json", second)
    write_json(source / "dataset/nextqa/map_vid_vidorID.json", {"4010069381": "1164/4010069381"})
    touch(source, "NExTVideo/1164/4010069381.mp4", "NExTVideo/0001/5772591393.mp4")


def charades_sta(source: Path) -> None:
    """An event that ends a little after its video; lines far too late, exchanged, broken."""
    lines = [
        "AO8RW 0.0 6.9##a person is putting a book on a shelf.",
        "AO8RW 24.3 31.6##person turn a light on.",
        "AO8RW 24.3 34.0##person turn a light off.",
        "AO8RW 31.2 31.5##person sits down.",
        "AO8RW 9.0 4.0##person opens the door.",
        "AO8RW 9.0##person opens the door.",
    ]
    source.mkdir(exist_ok=True)
    (source / "charades_sta_train.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (source / "charades_sta_test.txt").write_text(
        "3MSZA 24.3 30.4##person turn a light on.\n\n", encoding="utf-8"
    )
    script = 'A person puts a book, "the" book, on a shelf.'
    write_csv(
        source / "Charades_v1_train.csv", [("id", "script", "length"), ("AO8RW", script, "31.00")]
    )
    touch(source, "Charades_v1_480/AO8RW.mp4", "Charades_v1_480/3MSZA.mp4")


def unav100(source: Path) -> None:
    """Numbers with and without a point, overlapping events, a label twice; labels out of range."""

    def event(label: str, start: float, end: float) -> dict[str, Any]:
        return {"label": label, "label_id": len(label), "segment": [start, end]}

    barking = [
        event("dog barking", 20.0, 25.26),
        event("man speaking", 2.1, 8.4),
        event("dog barking", 5, 9.5),
    ]
    singing = [event("woman singing", 0, 10.3), event("cat purring", 12.0, 15.0)]
    database = {
        "__2MwJ2uHu0": {"subset": "train", "duration": 25.0, "annotations": barking},
        "2TvyObYvkeY": {"subset": "test", "duration": 10, "annotations": singing},
        "-0XOm9bG9Zw": {"subset": "validation", "duration": 10.0, "annotations": []},
    }
    write_json(
        source / "annotations/unav100_annotations.json", {"version": "v1", "database": database}
    )
    touch(source, *(f"raw_videos/{video}.mp4" for video in database))
