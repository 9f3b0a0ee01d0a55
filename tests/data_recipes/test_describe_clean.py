"""Test captions from raw descriptions: reasons of drops, answers that are kept, kills."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from chat_server import Server, said, stop
from making_fixtures import captioned_row, read_lines, recipe_module, write_lines

from avllm.data.manifest import read_manifest
from avllm.data.schema import Sample
from avllm.recipes import frame as recipe
from avllm.recipes.captions import PROMPTS
from avllm.text_models.base import Answer
from avllm.text_models.judging import Fault, judge_of

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "data_recipes" / "describe_clean.py"
# Description, what the model answers (None = it is not asked), reason of the drop (None = kept).
CASES: list[tuple[str, str | None, str | None]] = [
    ("Dog barking, recorded with Zoom H4n, 2011", "A dog barks in the distance.", None),
    ("<b>Rain</b> on a tin roof! http://sounds.example/rain", "Rain falls on a tin roof.", None),
    ("church bells &amp; pigeons", "Church bells ring while pigeons coo.", None),
    ("TV static", "A TV gives off static.", None),
    ("I walk on gravel", "Footsteps crunch on gravel. I think.", None),
    ("door", '"A door creaks open slowly."', None),
    ("kettle", "<think>tea</think>A kettle whistles loudly.", None),
    ("loop_120bpm_final_v2", "FAILURE", "refused"),
    ("asdf qwer", "I'm sorry, but I cannot describe this.", "refused"),
    ("my new sample pack", "NO SOUND", "no_sound_event"),
    ("silence in Paris", "No sound.", "no_sound_event"),
    ("wind", "Wind.", "too_short"),
    ("a very long one", "A " + "long " * 31 + "sound.", "too_long"),
    ("bus in London", "A bus passes by in London.", "name"),
    ("Anna laughs", "A woman called Anna laughs.", "name"),
    ("parade", "A parade passes on 4 July 1998.", "date"),
    ("clock", "A clock strikes at 12:30 in a hall.", "date"),
    ("ambience", "Street noise, recorded with a small microphone.", "device"),
    ("hum", "A hum of 50 Hz is heard.", "device"),
    ("ad", "A voice says to visit sounds.com today.", "url"),
    ("birds", "Birds sing.\nThis is a caption.", "several_lines"),
    ("nothing", "", "empty"),
    ("12345 !!", None, "no_words"),
    ("https://example.org/a.wav", None, "no_words"),
    ("word " * 501, None, "description_too_long"),
]


def reply(request: dict[str, Any], _: int) -> tuple[int, Any]:
    """Answer as a model that knows the cases; rewritings begin with words about the sound."""
    text = request["messages"][-1]["content"]
    if "Caption: " in text:
        caption = text.rpartition("Caption: ")[2]
        return 200, said(
            {"pitch": "A low and dull sound: ", "loud": ""}.get(kind(text), "FAILURE ") + caption
        )
    return 200, said(ANSWERS[text.rpartition("Description: ")[2]])


def kind(text: str) -> str:
    return "pitch" if "pitch and timbre" in text else "loud" if "how loud" in text else ""


def tidied(text: str) -> str:
    return str(recipe_module("describe_clean").tidied(text))


ANSWERS = {tidied(text): answer for text, answer, _ in CASES if answer is not None}


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(reply)
    yield server
    stop(server)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Write a table of a file and a description a row; the last clip is too short."""
    folder = tmp_path / "source"
    folder.mkdir()
    rows = []
    for number, (text, _, _) in enumerate(CASES):
        (folder / f"{number}.wav").write_bytes(b"RIFF")
        rows.append(
            {
                "id": f"c{number}",
                "audio": f"{number}.wav",
                "description": text,
                "licence": "CC0",
                "seconds": 3,
            }
        )
    rows.append({"id": "blink", "audio": "0.wav", "description": "a short click", "seconds": "0.2"})
    write_lines(folder / "raw.jsonl", rows)
    return folder


def clean(source: Path, output: Path, model: str, **options: Any) -> recipe.RecipeReport:
    module = recipe_module("describe_clean")
    options = {"file": "raw.jsonl", "shard_size": 6, **options}
    return recipe.make(
        module.ABOUT, module.rows, source, output, name="describe_clean", model=model, **options
    )


def by_id(output: Path) -> dict[str, Sample]:
    """Return the rows by their ids without the name of the set."""
    return {s.id.split("-", 2)[2]: s for s in read_manifest(output / "train.jsonl")}


def test_each_description_is_kept_or_dropped_for_its_reason(
    source: Path, server: Server, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    clean(source, output, f"{server.url}#m")
    samples = by_id(output)
    reasons = {d["where"]: d["reason"] for d in read_lines(output / "dropped.jsonl")}
    for number, (text, answer, reason) in enumerate(CASES):
        assert reasons.get(f"raw.jsonl:{number + 1}") == reason, text
        assert (f"c{number}" in samples) == (reason is None), text
        if reason is None:
            sample = samples[f"c{number}"]
            assert sample.answer == str(answer).rpartition("</think>")[2].strip()
            assert (sample.licence, sample.meta["raw"], sample.kind) == (
                "CC0",
                tidied(text),
                "caption",
            )
            assert Path(output / sample.media[0].path).resolve() == source / f"{number}.wav"
    assert reasons[f"raw.jsonl:{len(CASES) + 1}"] == "clip_too_short"
    assert len(server.requests) == len(ANSWERS)
    assert samples["c1"].meta["raw"] == "Rain on a tin roof!"


def test_captions_are_rewritten_and_bad_rewritings_dropped(
    source: Path, server: Server, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    report = clean(source, output, f"{server.url}#m", rewritings=3)
    samples = by_id(output)
    captions = sum(reason is None for *_, reason in CASES)
    assert report.rows["train"] == 2 * captions
    caption = samples["c0"]
    rewriting = samples["c0-rewriting-1"]
    assert rewriting.answer == "A low and dull sound: A dog barks in the distance."
    assert rewriting.meta == {"raw": caption.meta["raw"], "of": "c0", "rewriting": 1}
    assert rewriting.media == caption.media
    assert report.dropped["rewriting_same_as_caption"] == captions
    assert report.dropped["rewriting_refused"] == captions


def test_a_second_run_and_a_shared_folder_of_answers_ask_nothing(
    source: Path, server: Server, tmp_path: Path
) -> None:
    answers = str(tmp_path / "answers")
    clean(source, tmp_path / "one", f"{server.url}#m", answers=answers, rewritings=1)
    asked = len(server.requests)
    clean(source, tmp_path / "one", f"{server.url}#m", answers=answers, rewritings=1)
    clean(
        source,
        tmp_path / "two",
        f"{server.url}#m",
        answers=answers,
        rewritings=1,
        shard_size=4,
        most_words=40,
    )
    assert (
        len(server.requests) == asked + 1
    )  # the rewriting of the one caption that is not too long any more
    assert (
        read_manifest(tmp_path / "two" / "train.jsonl")[0].answer == "A dog barks in the distance."
    )
    with pytest.raises(recipe.RecipeError, match="words") as caught:
        clean(
            source,
            tmp_path / "one",
            f"{server.url}#m",
            answers=answers,
            rewritings=1,
            most_words=40,
        )
    assert caught.value.reason == "other_settings"


def test_a_killed_run_goes_on_where_it_was(source: Path, server: Server, tmp_path: Path) -> None:
    straight = tmp_path / "straight"
    clean(source, straight, f"{server.url}#m", rewritings=1)
    once = len(server.requests)
    server.requests.clear()

    def slowly(request: dict[str, Any], before: int) -> tuple[int, Any]:
        time.sleep(0.03)
        return reply(request, before)

    server.reply = slowly
    settings = tmp_path / "model.yaml"
    settings.write_text(
        yaml.safe_dump({"type": "server", "url": server.url, "model": "m", "batch_size": 1})
    )
    options = [
        "--model",
        str(settings),
        "--file",
        "raw.jsonl",
        "--rewritings",
        "1",
        "--shard-size",
        "6",
    ]
    output = tmp_path / "killed"
    command = [
        sys.executable,
        str(SCRIPT),
        str(source),
        "--output",
        str(output),
        *options,
        "--json",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    kills = 0
    for moment in (3, 11, once - 4):
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 120
        while (
            len(server.requests) < moment and process.poll() is None and time.monotonic() < deadline
        ):
            time.sleep(0.005)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills == 3
    assert not (output / "train.jsonl").exists()
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, timeout=180
    )
    assert json.loads(done.stdout.splitlines()[-1])["rows"]["train"] == len(
        read_manifest(straight / "train.jsonl")
    )
    assert (output / "train.jsonl").read_bytes() == (straight / "train.jsonl").read_bytes()
    assert (output / "dropped.jsonl").read_bytes() == (straight / "dropped.jsonl").read_bytes()
    assert (
        once <= len(server.requests) <= once + kills
    )  # at most the one request that was in flight


def test_captions_of_another_recipe_are_only_rewritten(tmp_path: Path, server: Server) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "a.wav").write_bytes(b"RIFF")
    rows = [captioned_row("a", "audio", "a.wav", "A dog barks at Anna.", None)]
    two = captioned_row("b", "audio", "a.wav", "Twice.")
    two["messages"][0]["content"].append({"type": "audio", "audio": "a.wav"})
    write_lines(folder / "train.jsonl", [*rows, two])
    report = clean(
        folder, tmp_path / "out", f"{server.url}#m", file="train.jsonl", clean=False, rewritings=1
    )
    caption, rewriting = read_manifest(tmp_path / "out" / "train.jsonl")[0], report.dropped
    assert (caption.answer, caption.licence) == (
        "A dog barks at Anna.",
        "unknown: the source names none",
    )
    assert rewriting == {"not_one_clip": 1, "rewriting_name": 1}


def test_rows_that_are_none_are_dropped_before_anything_is_asked(
    tmp_path: Path, server: Server
) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "a.wav").write_bytes(b"RIFF")
    whole = captioned_row("a", "audio", "a.wav", CASES[0][0])
    silent = {**whole, "messages": [{"role": "user"}]}
    table = {"id": "t", "audio": "a.wav", "description": CASES[0][0]}
    rows = [
        whole,
        silent,
        {**whole, "id": 7},
        {**table, "licence": ["CC0"]},
        {**table, "id": {}},
        {"audio": "a.wav"},
    ]
    write_lines(folder / "train.jsonl", rows)
    report = clean(folder, tmp_path / "out", f"{server.url}#m", file="train.jsonl")
    dropped = read_lines(tmp_path / "out" / "dropped.jsonl")
    assert [d["where"] for d in dropped] == [f"train.jsonl:{n}" for n in range(2, 7)]
    assert (report.rows, report.dropped) == ({"train": 1}, {"malformed_row": 5})
    assert "messages.0.content" in dropped[0]["detail"]
    assert "'description'" in dropped[4]["detail"]
    assert len(server.requests) == 1
    (folder / "raw.csv").write_text("audio,description\na.wav,door\na.wav\n")
    with pytest.raises(recipe.RecipeError) as caught:
        clean(folder, tmp_path / "csv", f"{server.url}#m", file="raw.csv", text="text")
    assert caught.value.reason == "no_column"
    assert clean(folder, tmp_path / "csv", f"{server.url}#m", file="raw.csv").dropped == {
        "malformed_row": 1
    }


def test_of_missing_files_nothing_is_asked_until_they_are_there(
    source: Path, server: Server, tmp_path: Path
) -> None:
    output, gone = tmp_path / "out", [source / "0.wav", source / "1.wav"]
    for path in gone:
        path.unlink()
    report = clean(source, output, f"{server.url}#m")
    assert (report.missing_files, report.dropped["missing_media"]) == (2, 2)
    assert (output / "missing.txt").read_text().splitlines() == [str(path) for path in gone]
    assert len(server.requests) == len(ANSWERS) - 2
    gone[1].write_bytes(b"RIFF")
    assert clean(source, output, f"{server.url}#m").missing_files == 1
    assert len(server.requests) == len(ANSWERS) - 1
    gone[0].write_bytes(b"RIFF")
    report = clean(source, output, f"{server.url}#m")
    assert (report.missing_files, len(server.requests)) == (0, len(ANSWERS))
    assert report.rows["train"] == sum(reason is None for *_, reason in CASES)


def test_of_a_video_too_it_is_asked_what_is_heard(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    rows = [
        {"id": f"c{n}", "audio": f"{n}.mp4", "description": f"a dog barks {n} times"}
        for n in range(8)
    ]
    write_lines(folder / "raw.jsonl", rows)
    for row in rows:
        (folder / row["audio"]).write_bytes(b"x")
    (folder / "rules.yaml").write_text("rules: []")
    clean(folder, tmp_path / "out", f"rules:{folder / 'rules.yaml'}", clean=False)
    samples = read_manifest(tmp_path / "out" / "train.jsonl")
    assert {s.media[0].type for s in samples} == {"video"}
    assert {s.messages[0].text for s in samples} <= set(PROMPTS["audio"])


def test_mistakes_in_options_have_reasons(source: Path, tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text("rules: [[dog, A dog barks loudly.]]\notherwise: FAILURE\n")
    model = f"rules:{rules}"
    for options, reason in (
        ({"model": ""}, "no_model"),
        ({"rewritings": 9}, "too_few_prompts"),
        ({"prompts": "nothing.yaml"}, "no_file"),
        ({"file": "nothing.jsonl"}, "no_file"),
        ({"prompts": str(rules)}, "bad_prompts"),
        ({"engine": "spark"}, "unknown_engine"),
    ):
        with pytest.raises(recipe.RecipeError) as caught:
            clean(source, tmp_path / "out", **{"model": model, **options})
        assert caught.value.reason == reason, options


def test_settings_that_cannot_be_read_are_named(source: Path, tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text("rules: []\notherwise: A dog barks loudly.")
    for text in ("{broken", "[]"):
        clean(source, tmp_path / "out", f"rules:{tmp_path / 'rules.yaml'}")
        (tmp_path / "out" / "job" / "run.json").write_text(text)
        with pytest.raises(recipe.RecipeError, match=r"run\.json") as caught:
            clean(source, tmp_path / "out", f"rules:{tmp_path / 'rules.yaml'}")
        assert caught.value.reason == "broken_settings"
        shutil.rmtree(tmp_path / "out")


def test_rules_do_for_a_text_model(source: Path, tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text(
        yaml.safe_dump(
            {"rules": [["Description: Dog", "A dog barks loudly."]], "otherwise": "FAILURE"}
        )
    )
    report = clean(source, tmp_path / "out", f"rules:{rules}")
    assert [s.answer for s in read_manifest(tmp_path / "out" / "train.jsonl")] == [
        "A dog barks loudly."
    ]
    assert report.dropped["refused"] == len(ANSWERS) - 1


def test_names_are_words_with_a_capital_inside_a_sentence() -> None:
    module = recipe_module("describe_clean")
    judge = judge_of(module.PROMPTS.read_text())
    for text, names in {
        "A man speaks. Then Bob laughs.": ["Bob"],
        "I hear a TV, and I laugh.": [],
        "Rain falls; the Thames flows.": ["Thames"],
        'A voice says: "Hello there."': [],
        "A dog of the McAllisters barks in New York.": ["McAllisters", "New", "York"],
    }.items():
        assert judge.names(text) == names, text
    fault = judge.fault(Answer(reason="cut_off", detail="long"), (3, 30))
    assert fault == Fault("cut_off", "long")
