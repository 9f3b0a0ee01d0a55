"""Test recipes of captions: the rows that the sources become."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from avllm.data.manifest import read_manifest
from avllm.data.schema import Sample
from avllm.recipes.captions import PROMPTS
from avllm.recipes.frame import RecipeError, make
from data_recipes import sources_captions

RECIPES = Path(__file__).resolve().parents[2] / "data_recipes"
Run = Callable[..., SimpleNamespace]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs a recipe on its source, changed by ``spoil(source)``: splits, drops, missing files."""

    def ran(
        name: str, spoil: Callable[[Path], Any] | None = None, **options: Any
    ) -> SimpleNamespace:
        spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        source, output = tmp_path / name / "source", tmp_path / name / "out"
        getattr(sources_captions, name)(source)
        if spoil is not None:
            spoil(source)
        report = make(module.ABOUT, module.rows, source, output, name=name, **options)
        splits = {split: read_manifest(output / f"{split}.jsonl") for split in report.rows}
        drops = [json.loads(line) for line in (output / "dropped.jsonl").read_text().splitlines()]
        missing = (output / "missing.txt").read_text().splitlines()
        return SimpleNamespace(
            **splits,
            drops=[(d["reason"], d["where"]) for d in drops],
            missing=missing,
            report=report,
        )

    return ran


def files(samples: list[Sample]) -> list[str]:
    return [sample.media[0].path.removeprefix("../source/") for sample in samples]


def answers(samples: list[Sample]) -> list[str]:
    return [sample.answer or "" for sample in samples]


def test_webvid(run: Run) -> None:
    made = run("webvid")
    assert answers(made.train) == ["Aerial shot winter forest", "Senior couple, looking at the sea"]
    assert files(made.train) == [
        "videos/006001_006050/21179416.mp4",
        "videos/071501_071550/5629184.mp4",
    ]
    assert [s.id for s in made.validation] == ["webvid-1210"]
    assert made.drops == [("no_page_dir", "results_2M_train.csv:4")]
    assert {s.messages[0].text for s in made.train} <= set(PROMPTS["video"])


def test_webvid_without_the_folder_videos_and_of_another_subset(run: Run) -> None:
    def spoil(source: Path) -> None:
        (source / "metadata").mkdir()
        for name in ("train", "val"):
            (source / f"results_2M_{name}.csv").rename(
                source / "metadata" / f"results_10M_{name}.csv"
            )
        for page in list((source / "videos").iterdir()):
            page.rename(source / page.name)

    made = run("webvid", spoil, subset="10M")
    assert files(made.train) == ["006001_006050/21179416.mp4", "071501_071550/5629184.mp4"]


def test_webvid_of_a_subset_that_is_not_there(run: Run) -> None:
    with pytest.raises(RecipeError, match=r"results_10M_train\.csv") as caught:
        run("webvid", subset="10M")
    assert caught.value.reason == "no_table"


def test_webvid_in_parts(run: Run) -> None:
    def spoil(source: Path) -> None:
        lines = (source / "results_2M_train.csv").read_text().splitlines(keepends=True)
        parts = source / "data" / "train" / "partitions"
        parts.mkdir(parents=True)
        (parts / "0000.csv").write_text("".join(lines[:2]))
        (parts / "0001.csv").write_text("".join([lines[0], *lines[2:]]))
        (source / "results_2M_train.csv").unlink()

    made = run("webvid", spoil)
    assert [s.id for s in made.train] == ["webvid-21179416", "webvid-5629184"]
    assert made.drops == [("no_page_dir", "0001.csv:3")]


def test_llava_pretrain_keeps_the_authors_questions_and_order(run: Run) -> None:
    made = run("llava_pretrain")
    first, second = made.train
    assert [part.type for part in first.messages[0].content] == ["text", "image"]
    assert [part.type for part in second.messages[0].content] == ["image", "text"]
    assert first.messages[0].text == "Render a clear and concise summary of the photo."
    assert answers(made.train) == ["select luxury furniture", "a grey shirt"]
    assert made.drops == [("empty_turn", "blip_laion_cc_sbu_558k.json[2]")]


def test_llava_pretrain_with_our_prompts_and_images_unpacked_in_place(run: Run) -> None:
    def spoil(source: Path) -> None:
        (source / "blip_laion_cc_sbu_558k.json").rename(source / "chat.json")
        for folder in list((source / "images").iterdir()):
            folder.rename(source / folder.name)

    made = run("llava_pretrain", spoil, own_prompts=True)
    assert {s.messages[0].text for s in made.train} <= set(PROMPTS["image"])
    assert files(made.train) == ["00453/004539375.jpg", "00223/002239345.jpg"]


def test_valor_takes_the_clip_or_the_interval_of_the_whole_video(run: Run) -> None:
    made = run("valor")
    assert files(made.train) == [
        "raw_videos/-_AbQ_z5rUM_30.000_40.000.mp4",
        "raw_videos/x6iCUDmRpKQ_0.000_10.000.mkv",
    ]
    assert all(s.media[0].start is None for s in made.train)
    (test,) = made.test
    assert files([test]) == ["raw_videos/Sv9fcuRfk2o.mp4"]
    assert (test.media[0].start, test.media[0].end) == (12.5, 22.5)
    assert (test.answer, test.answers) == ("A horn.", ["A car."])
    assert test.messages[0].text == PROMPTS["audiovisual"][0]
    assert made.drops == [
        ("empty_caption", "desc_train.json[2]"),
        ("no_words", "desc_train.json[3]"),
    ]


def test_valor_1m_is_given_by_its_file(run: Run) -> None:
    made = run(
        "valor",
        lambda source: (source / "desc_train.json").rename(source / "valor_1m.json"),
        train="valor_1m.json",
    )
    assert len(made.train) == 2


def test_valor_names_the_clips_that_it_misses(run: Run) -> None:
    made = run(
        "valor", lambda source: (source / "raw_videos/x6iCUDmRpKQ_0.000_10.000.mkv").unlink()
    )
    assert made.missing == ["x6iCUDmRpKQ_0.000_10.000.mp4"]


def test_videos_may_lie_elsewhere(run: Run, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    made = run(
        "valor", lambda source: (source / "raw_videos").rename(elsewhere), videos=str(elsewhere)
    )
    assert files(made.test) == ["../../elsewhere/Sv9fcuRfk2o.mp4"]
    assert not made.missing


def test_audiocaps_finds_all_namings_and_joins_broken_captions(run: Run) -> None:
    made = run("audiocaps")
    assert dict(zip(files(made.train), answers(made.train), strict=True)) == {
        "train/Yr1nicOVtvkQ.wav": "A woman talks nearby as water pours",
        "train/IAosP90cdsE_30.flac": "an engine chugging loudly with muffled speech in the "
        "background, far away",
        "train/Y--0PQM4-hqg_30.000_40.000.wav": "Rustling occurs, ducks quack",
    }
    assert made.drops == [("empty_caption", "train.csv:6")]
    assert made.train[0].meta == {"youtube_id": "r1nicOVtvkQ", "start_time": "130"}


def test_audiocaps_of_the_repository_holds_two_versions(run: Run) -> None:
    def spoil(source: Path) -> None:
        for folder in ("dataset", "dataset2.0"):
            (source / folder).mkdir()
            (source / folder / "train.csv").write_text(
                (source / "train.csv").read_text().replace("woman", folder)
            )
        (source / "train.csv").unlink()

    assert (
        answers(run("audiocaps", spoil, version="2").train)[0]
        == "A dataset2.0 talks nearby as water pours"
    )


def test_audiocaps_gathers_the_five_captions_of_a_test_clip(run: Run) -> None:
    first, second = run("audiocaps").test
    assert [first.answer, *(first.answers or [])] == [f"caption {n}" for n in range(5)]
    assert files([first, second]) == ["test/100.wav", "test/tdWhHV3X25Q.wav"]
    assert (second.id, second.answers) == ("audiocaps-tdWhHV3X25Q", None)
    assert first.messages[0].text == second.messages[0].text == PROMPTS["audio"][0]


def test_audiocaps_drops_what_it_cannot_join(run: Run) -> None:
    def spoil(source: Path) -> None:
        with (source / "train.csv").open("a") as file:
            file.write("12,abcdefghijk,0,a caption, with a comma but no quotes\n")

    made = run("audiocaps", spoil)
    assert ("malformed_row", "train.csv:7") in made.drops
    assert len(made.train) == 3


def test_audiocaps_joins_nothing_to_a_row_further_up(run: Run) -> None:
    def spoil(source: Path) -> None:
        with (source / "train.csv").open("a") as file:
            file.write("a caption that begins on the second line\n")

    made = run("audiocaps", spoil)
    assert answers(made.train)[-1] == "Rustling occurs, ducks quack"
    assert made.drops == [("empty_caption", "train.csv:6"), ("malformed_row", "train.csv:7")]


@pytest.mark.parametrize("rest", ["one, two, three and four", "one, two, three, four, five"])
def test_audiocaps_joins_the_rest_of_a_caption_whatever_its_commas(run: Run, rest: str) -> None:
    def spoil(source: Path) -> None:
        with (source / "train.csv").open("a") as file:
            file.write(f"12,r1nicOVtvkQ,0,somebody counts\n{rest}\n")

    made = run("audiocaps", spoil)
    assert answers(made.train)[-1] == f"somebody counts {rest}"
    assert made.drops == [("empty_caption", "train.csv:6")]


def test_clotho_has_five_rows_a_sound_in_training_and_one_in_test(run: Run) -> None:
    made = run("clotho")
    assert len(made.train) == 10
    assert len({s.id for s in made.train}) == 10
    assert len({s.messages[0].text for s in made.train}) > 2
    assert set(files(made.train)) == {
        "development/Distorted AM Radio noise.wav",
        "development/café  machine.wav",
    }
    (test,) = made.test
    assert files([test]) == ["clotho_audio_files/evaluation/Santa Motor.wav"]
    assert [test.answer, *(test.answers or [])] == [f"motor {n}" for n in range(5)]
    assert made.drops == [("empty_caption", "clotho_captions_development.csv:4")]


def test_clotho_takes_the_licence_of_each_sound(run: Run) -> None:
    train = run("clotho").train
    assert {s.licence for s in train if "café" in s.id} == {
        "http://creativecommons.org/licenses/by/3.0/"
    }
    assert {"Tampere" in (s.licence or "") for s in train if "Radio" in s.id} == {True}


def test_wavcaps_leaves_out_what_is_listed_or_long(run: Run) -> None:
    made = run("wavcaps")
    assert [s.id for s in made.train] == [
        "wavcaps-AudioSet_SL-Yb0RFKhbpFJA",
        "wavcaps-FreeSound-2219",
        "wavcaps-SoundBible-2219",
    ]
    assert files(made.train)[1] == "audio/FreeSound/2219.flac"
    assert files(made.train)[2].endswith("/SoundBible_flac/2219.flac")
    assert made.drops == [
        ("blacklisted", "as_final.json[1]"),
        ("too_long", "fsd_final.json[1]"),
        ("empty_caption", "sb_final.json[1]"),
    ]


def test_wavcaps_with_everything(run: Run) -> None:
    made = run("wavcaps", exclude="none", max_seconds=1e5)
    assert made.missing == ["AudioSet_SL_flac/Y-z9V0BXVgzY.flac", "FreeSound_flac/180914.flac"]


def test_wavcaps_without_the_blacklist_asked_for(run: Run) -> None:
    with pytest.raises(RecipeError, match=r"blacklist_exclude_all_ac\.json") as caught:
        run("wavcaps", exclude="all_ac")
    assert caught.value.reason == "no_blacklist"


def test_vggsound_asks_for_the_label(run: Run) -> None:
    made = run("vggsound")
    assert answers(made.train) == ["waterfall burbling", "playing tennis, indoors"]
    assert [Path(file).name for file in files(made.train)] == [
        "--0PQM4-hqg_000030.mp4",
        "--56QUhyDQM_185.mp4",
    ]
    assert made.drops == [("malformed_row", "vggsound.csv:4")]
    assert {s.messages[0].text for s in made.train} <= set(PROMPTS["label"])


def test_vggsound_by_ear_with_its_classes(run: Run) -> None:
    (test,) = run("vggsound", media="audio", choices=True).test
    assert test.media[0].type == "audio"
    assert test.choices is not None
    assert test.answer in test.choices
    assert len(test.choices) == 4
