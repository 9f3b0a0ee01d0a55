"""Instruction sets in their authors' layout, a few rows each: one function a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_recipes.sources_captions import touch, write_json


def turns(*texts: str) -> list[dict[str, str]]:
    """Turns of a ShareGPT conversation; a question first."""
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]


def sharegpt(source: Path) -> None:
    """Two conversations about one picture, under one id; placeholders at both ends; bad rows."""
    first = {"id": "000000033471", "image": "000000033471.jpg"}
    rows: list[dict[str, Any]] = [
        first
        | {
            "conversations": turns(
                "<image>\nWhat are the colors of the bus?",
                "White and red.",
                "And the sky?",
                "Blue.",
            )
        },
        first
        | {
            "conversations": turns(
                "Describe the scene.\n<image>", "A bus waits in front of a shop."
            )
        },
        {"id": 7, "conversations": turns("Who wrote Faust?", "Goethe.")},
        {
            "id": "two",
            "image": ["a.jpg"],
            "conversations": turns("<image><image>\nWhat differs?", "The hat."),
        },
        {
            "id": "html",
            "conversations": turns("What does <image> mean in SVG?", "A raster picture."),
        },
        {"id": "back", "conversations": turns("Hello.", "Hello.", "Why?", "Because.")[1:]},
        {"id": "open", "conversations": turns("Hello.", "Hello.", "Why?")},
    ]
    write_json(source / "llava_instruct_150k.json", rows)
    write_json(source / "detail_23k.json", rows[1:2])
    touch(source, "train2017/000000033471.jpg", "train2017/a.jpg")


def videochat(source: Path) -> None:
    """A conversation, a description with an instruction, a pair without answer; as one file."""
    pairs = [
        {"q": "What is the man doing?", "a": "He surfs."},
        {"q": "Where?", "a": "On a big wave."},
    ]
    described = {"i": "Describe the video in detail.", "q": "", "a": "Two dogs run over a lawn."}
    rows = [
        {"video": "076101_076150/1066653121.mp4", "QA": pairs},
        {"video": "016401_016450/11671436.mp4", "QA": [described]},
        {"video": "016401_016450/11671436.mp4", "QA": [{"q": "What is it?", "a": " "}]},
    ]
    write_json(source / "videochat_instruct_11k.json", rows)
    touch(source, "videos/076101_076150/1066653121.mp4", "videos/11671436.mp4")


def videochat2(source: Path) -> None:
    """The same set in VideoChat2-IT: two files, an instruction in each pair, an interval."""
    described = {"i": "Describe the clip in detail.", "q": "", "a": "Two dogs run over a lawn."}
    asked = [
        {"i": "Answer briefly.", "q": "What is it?", "a": "A man."},
        {"i": "Answer briefly.", "q": "Where?", "a": "Here."},
    ]
    rows = [{"video": "076101_076150/1066653121.mp4", "QA": asked, "start": 1.5, "end": 4}]
    write_json(
        source / "video/caption/videochat/train.json",
        [{"video": "016401_016450/11671436.mp4", "QA": [described]}],
    )
    write_json(source / "video/conversation/videochat1/train.json", rows)
    touch(source, "videos/076101_076150/1066653121.mp4", "videos/11671436.mp4")


def video_chatgpt(source: Path) -> None:
    """Two questions about a video, one about an mkv, one without a question."""
    rows = [
        {"q": "What is the boy doing?", "a": "The boy cleans a sink.", "video_id": "v_k_ZXmr8pmrs"},
        {"q": "Where does it take place?", "a": "In a bathroom.", "video_id": "v_k_ZXmr8pmrs"},
        {"q": "What is the main activity?", "a": "People ski.", "video_id": "v_-PFGmr8pmrs"},
        {"q": "", "a": "Nothing.", "video_id": "v_k_ZXmr8pmrs"},
    ]
    write_json(source / "VideoInstruct_Dataset.json", rows)
    touch(source, "videos/v_k_ZXmr8pmrs.mp4", "videos/v_-PFGmr8pmrs.mkv")


def avsd(source: Path) -> None:
    """Dialogues to train on; a test set with its last answers in a file, and an absent one."""

    def dialogue(video: str, *answers: str) -> dict[str, Any]:
        asked = [
            {"question": f"question {n} ?", "answer": answer} for n, answer in enumerate(answers)
        ]
        summary = "the girl walks into a room"
        return {
            "image_id": video,
            "summary": summary,
            "caption": "a person walked in .",
            "dialog": asked,
        }

    train = {"type": "train", "dialogs": [dialogue("YSE1G", "only one person .", "yes")]}
    hidden = [dialogue("7NCBM", "no .", "__UNDISCLOSED__"), dialogue("EDXBD", "__UNDISCLOSED__")]
    disclosed = [dialogue("7NCBM", "no .", "he is looking outside ."), hidden[1]]
    write_json(source / "train_set4DSTC7-AVSD.json", train)
    write_json(
        source / "val_set4DSTC7-AVSD.json", {"dialogs": [dialogue("YSE1G", "yes , there is .")]}
    )
    write_json(source / "test_set4DSTC7-AVSD.json", {"dialogs": hidden})
    write_json(source / "lbl_test_set4DSTC7-AVSD.json", {"dialogs": disclosed})
    touch(
        source,
        "Charades_v1_480/YSE1G.mp4",
        "Charades_vu17_test_480/7NCBM.mp4",
        "Charades_vu17_test_480/EDXBD.mp4",
    )


def avinstruct(source: Path) -> None:
    """A row of each file, feature files in the fields, and a row without its placeholder."""

    def row(video: str, *texts: str) -> dict[str, Any]:
        features = {
            "video": f"/mnt/sda/imagebind_v_feats/{video}.npy",
            "audio": f"/mnt/sda/{video}.mp3.npy",
        }
        return {
            "video_id": video,
            "multi_choice": "",
            "correct_answer": "",
            **features,
            "conversations": turns(*texts),
        }

    asked = (
        "Summarize the video to help answer:\n"
        "<Q>How many instruments are sounding in the video?<Q>\n<video>"
    )
    write_json(
        source / "AVinstruct/avqa_data1.json",
        [row("00005580", asked, "Two: the violin and the cello.")],
    )
    rows = [
        row("-HG3Omg_89c_000030", "<Q>What happened in the video?<Q>\n<video>", "A yacht passes.")
        | {"video_id": "341"},
        row("00005580", "<Q>What is it?<Q>", "A violin."),
    ]
    write_json(source / "AVinstruct/avqa_data2.json", rows)
    touch(source, "music/00005580.mp4", "vggsound/-HG3Omg_89c_30.mp4")


def own_answers(source: Path) -> None:
    """Four questions; one is right also without its sound, one was not asked, one failed."""

    def line(name: str, condition: str, answer: str, correct: bool, failed: bool = False) -> Any:
        fields = {"id": name, "condition": condition, "answer": answer}
        return fields | {"correct": correct, "failed": failed}

    rows, predictions = [], []
    for name in ("wrong", "right", "not_asked", "failed"):
        content = [{"type": "audio", "audio": "a.wav"}, {"type": "text", "text": "What is it?"}]
        user = {"role": "user", "content": content}
        rows.append({"id": name, "messages": [user, {"role": "assistant", "content": "a bell"}]})
    predictions.append(line("wrong", "as_is", "a dog", correct=False))
    predictions.append(line("wrong", "without_audio", "a cat", correct=False))
    predictions.append(line("wrong", "swapped_audio", "a cat", correct=False))
    predictions.append(line("right", "without_audio", "a bell", correct=True))
    predictions.append(line("failed", "without_audio", "", correct=False, failed=True))
    for file, lines in (("train.jsonl", rows), ("predictions.jsonl", predictions)):
        text = "".join(json.dumps(one) + "\n" for one in lines)
        (source / file).write_text(text, encoding="utf-8")
    touch(source, "a.wav")
