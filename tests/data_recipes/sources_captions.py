"""Caption and label sets in their authors' layout, a few rows each: one function a recipe.

The contract test finds the functions of all ``sources_*.py`` here. Media are files of one byte:
recipes decode nothing.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def touch(source: Path, *names: str) -> None:
    """Files that are not empty, and their folders."""
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(b"x")


def write_json(path: Path, value: Any) -> None:
    """A JSON file and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_csv(path: Path, rows: Iterable[Sequence[Any]], encoding: str = "utf-8") -> None:
    """A CSV file and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding=encoding) as file:
        csv.writer(file).writerows(rows)


def webvid(source: Path) -> None:
    """Two clips and a row without page_dir; a title with a comma; one clip for validation."""
    columns = ("videoid", "contentUrl", "duration", "page_dir", "name")
    train: list[Sequence[Any]] = [
        columns,
        (
            21179416,
            "https://example.org/21179416.mp4",
            "PT00H00M11S",
            "006001_006050",
            "Aerial shot winter forest",
        ),
        (
            5629184,
            "https://example.org/5629184.mp4",
            "PT00H00M29S",
            "071501_071550",
            "Senior couple, looking at the sea",
        ),
        (1063125190, "https://example.org/1063125190.mp4", "PT00H00M15S", "", "A map of vilnius"),
    ]
    write_csv(source / "results_2M_train.csv", train)
    write_csv(
        source / "results_2M_val.csv",
        [columns, (1210, "https://example.org/1210.mp4", "PT1S", "1_50", "A cat")],
    )
    touch(
        source,
        "videos/006001_006050/21179416.mp4",
        "videos/071501_071550/5629184.mp4",
        "videos/1_50/1210.mp4",
    )


def llava_pretrain(source: Path) -> None:
    """<image> before and after the question, and a row whose caption is empty."""

    def row(name: str, question: str, caption: str) -> dict[str, Any]:
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": caption}]
        return {"id": name, "image": f"{name[:5]}/{name}.jpg", "conversations": turns}

    rows = [
        row(
            "004539375",
            "Render a clear and concise summary of the photo.\n<image>",
            "select luxury furniture",
        ),
        row("002239345", "<image>\nWrite a terse but informative summary.", "a grey shirt "),
        row("005947502", "<image>\nWhat is this?", " "),
    ]
    write_json(source / "blip_laion_cc_sbu_558k.json", rows)
    touch(source, *(f"images/{row['image']}" for row in rows))


def valor(source: Path) -> None:
    """Ids with underscores, a clip with only its whole video; empty and lost captions."""
    train = [
        {
            "video_id": "-_AbQ_z5rUM_30.000_40.000",
            "desc": "In the room, a cat whirled around the door, meowing.",
        },
        {"video_id": "x6iCUDmRpKQ_0.000_10.000", "desc": "A man plays the flute."},
        {"video_id": "kk3C2gcJOpc_30.000_40.000", "desc": ""},
        {"video_id": "Agi5ySKb1tY_23.700_33.700", "desc": "700"},
    ]
    write_json(source / "desc_train.json", train)
    write_json(
        source / "desc_test.json",
        [{"video_id": "Sv9fcuRfk2o_12.500_22.500", "caption": ["A horn.", "A car."]}],
    )
    touch(
        source,
        "raw_videos/-_AbQ_z5rUM_30.000_40.000.mp4",
        "raw_videos/x6iCUDmRpKQ_0.000_10.000.mkv",
    )
    touch(source, "raw_videos/Sv9fcuRfk2o.mp4")


def audiocaps(source: Path) -> None:
    """Three namings, a caption over two lines, a row without one, a test clip's captions apart."""
    header = "audiocap_id,youtube_id,start_time,caption\n"
    (source / "train.csv").parent.mkdir(parents=True, exist_ok=True)
    (source / "train.csv").write_text(
        header
        + "91139,r1nicOVtvkQ,130,A woman talks nearby as water pours\n"
        + "39899,IAosP90cdsE,30,an engine chugging loudly, with muffled\n".replace(
            "loudly,", "loudly"
        )
        + "speech in the background, far away\n"
        + '97151,--0PQM4-hqg,30,"Rustling occurs, ducks quack"\n'
        + "11,abcdefghijk,0,\n",
        encoding="utf-8",
    )
    write_csv(
        source / "test.csv",
        [
            header.strip().split(","),
            *[(100 + n, "vfY_TJq7n_U", 130, f"caption {n}") for n in range(3)],
            (200, "tdWhHV3X25Q", 60, "An audience gives applause"),
            *[(103 + n, "vfY_TJq7n_U", 130, f"caption {3 + n}") for n in range(2)],
        ],
    )
    touch(
        source,
        "train/Yr1nicOVtvkQ.wav",
        "train/IAosP90cdsE_30.flac",
        "train/Y--0PQM4-hqg_30.000_40.000.wav",
    )
    touch(source, "test/100.wav", "test/tdWhHV3X25Q.wav")


def clotho(source: Path) -> None:
    """Two splits; metadata of one of them, in ISO-8859-1; a sound without captions."""
    columns = ["file_name", *(f"caption_{n}" for n in range(1, 6))]
    names = ["Distorted AM Radio noise.wav", "café  machine.wav"]
    write_csv(
        source / "clotho_captions_development.csv",
        [
            columns,
            *[[name, *(f"{name[:4]} caption {n}." for n in range(5))] for name in names],
            ["nothing.wav", *[""] * 5],
        ],
    )
    metadata = [
        "file_name",
        "keywords",
        "sound_id",
        "sound_link",
        "start_end_samples",
        "manufacturer",
        "license",
    ]
    licence = "http://creativecommons.org/licenses/by/3.0/"
    write_csv(
        source / "clotho_metadata_development.csv",
        [
            metadata,
            [
                names[1],
                "café;machine",
                "80399",
                "https://example.org/80399",
                "[1024, 845524]",
                "José",
                licence,
            ],
        ],
        encoding="iso-8859-1",
    )
    write_csv(
        source / "clotho_captions_evaluation.csv",
        [columns, ["Santa Motor.wav", *(f"motor {n}" for n in range(5))]],
    )
    touch(
        source,
        *(f"development/{name}" for name in names),
        "clotho_audio_files/evaluation/Santa Motor.wav",
    )


def wavcaps(source: Path) -> None:
    """Three parts: a test set's sound, one of two hours, one without caption; an id twice."""
    audioset = [
        {
            "id": "Yb0RFKhbpFJA.wav",
            "caption": "Wind and a man speaking are heard.",
            "audio": "wav_path",
            "duration": 10.0,
        },
        {
            "id": "Y-z9V0BXVgzY.wav",
            "caption": "A bell rings.",
            "audio": "wav_path",
            "duration": 10.0,
        },
    ]
    freesound = [
        {
            "id": "2219",
            "file_name": "UK Mello.wav",
            "tags": ["ringtone"],
            "caption": "A ringtone plays.",
            "duration": 3.2,
        },
        {
            "id": "180914",
            "file_name": "rain.wav",
            "tags": [],
            "caption": "It rains.",
            "duration": 7200.5,
        },
    ]
    soundbible = [
        {
            "title": "Airplane",
            "caption": "An airplane is landing.",
            "id": "2219",
            "duration": 14.14,
        },
        {"title": "Nothing", "caption": None, "id": "2220", "duration": 1.0},
    ]
    for folder, name, data in [
        ("AudioSet_SL", "as", audioset),
        ("FreeSound", "fsd", freesound),
        ("SoundBible", "sb", soundbible),
    ]:
        content = {"num_captions_per_audio": 1, "data": data}
        write_json(source / "json_files" / folder / f"{name}_final.json", content)
    blacklist = {"AudioSet": ["Y-z9V0BXVgzY.wav"], "FreeSound": []}
    write_json(source / "json_files/blacklist/blacklist_exclude_test_ac.json", blacklist)
    unpacked = "Zip_files/mnt/fast/nobackup/WavCaps/data/waveforms"
    touch(
        source,
        f"{unpacked}/AudioSet_SL_flac/Yb0RFKhbpFJA.flac",
        f"{unpacked}/SoundBible_flac/2219.flac",
    )
    touch(source, "audio/FreeSound/2219.flac")


def vggsound(source: Path) -> None:
    """No header; a label with a comma; a copy with another form of its start; an unknown split."""
    rows = [
        ("---g-f_I2yQ", 1, "people marching", "test"),
        ("--0PQM4-hqg", 30, "waterfall burbling", "train"),
        ("--56QUhyDQM", 185, "playing tennis, indoors", "train"),
        ("--5OkAjCI7g", 40, "people belly laughing", "validate"),
    ]
    write_csv(source / "vggsound.csv", rows)
    folder = "scratch/shared/beegfs/hchen/train_data/VGGSound_final/video"
    touch(source, *(f"{folder}/{clip}_{start:06d}.mp4" for clip, start, _, _ in rows[:2]))
    touch(source, *(f"{folder}/{clip}_{start}.mp4" for clip, start, _, _ in rows[2:]))


ESC_COLUMNS = ("filename", "fold", "target", "category", "esc10", "src_file", "take")
OPTIONS = {"esc50": {"test_fold": 1}}


def esc50(source: Path) -> None:
    """meta/esc50.csv and audio/: three folds, three classes, one not in ESC-10; an unknown one."""
    rows: list[Sequence[Any]] = []
    for number, (category, esc10) in enumerate(
        {"dog": "True", "rain": "True", "pig": "False"}.items()
    ):
        for fold in (1, 2, 3):
            for clip, take in [
                (f"{fold}{number}00", "A"),
                (f"{fold}{number}00", "B"),
                (f"{fold}{number}01", "A"),
            ]:
                rows.append(
                    (
                        f"{fold}-{clip}-{take}-{number}.wav",
                        fold,
                        number,
                        category,
                        esc10,
                        clip,
                        take,
                    )
                )
    touch(source, *(f"audio/{row[0]}" for row in rows))
    unknown = ("1-7-A-99.wav", 1, 99, "yodelling", "False", "7", "A")
    write_csv(source / "meta" / "esc50.csv", [ESC_COLUMNS, *rows, unknown])
