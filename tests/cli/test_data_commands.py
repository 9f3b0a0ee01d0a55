"""`avllm data check`, `show`, `stats` and `mix` as commands: what they count, print and refuse."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from data.check.checked_rows import about, words
from tiny import World, make_world, row, settings, write_clip, write_preset, write_rows
from typer.testing import CliRunner

from avllm.cli.main import app
from avllm.data.check.files import ExamineOptions
from avllm.data.check.stats import modality, stats
from avllm.data.manifest import ManifestError
from avllm.data.schema import Sample
from avllm.errors import UserError

INVOKE = CliRunner().invoke


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), clips=2)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", (200, 30, 30), 400.0)


@pytest.fixture
def preset(world: World, tmp_path: Path) -> Path:
    return write_preset(tmp_path / "stage.yaml", settings(world, tmp_path / "run", "align"))


def test_sound_tracks_are_counted(clip: Path, tmp_path: Path) -> None:
    mute = write_clip(tmp_path / "mute.mp4", (0, 200, 0), None)
    silenced = about(mute, "off")
    silenced["messages"][0]["content"][0]["sound"] = "off"
    rows = [
        about(clip, "heard"),
        about(mute, "mute"),
        silenced,
        about(tmp_path / "gone.mp4", "gone"),
    ]
    manifest = write_rows(tmp_path / "m.jsonl", rows)
    for decode in ("headers", "sample"):
        found = stats([manifest], options=ExamineOptions(decode, workers=1)).total
        assert (found.sound, found.no_sound) == (1, 1)
    assert stats([manifest]).total.sound == 0
    hint = "give --probe to open the files for the length of their clips"
    assert hint in INVOKE(app, ["data", "stats", str(manifest)]).stderr
    told = INVOKE(app, ["data", "stats", str(manifest), "--probe", "--json"])
    assert json.loads(told.stdout.splitlines()[-1])["total"]["no_sound"] == 1
    assert hint not in told.stderr


def test_a_pipe_gets_examples_uncut(tmp_path: Path) -> None:
    manifest = write_rows(tmp_path / "m.jsonl", [about(tmp_path / "gone.mp4", "long" * 40)])
    told = INVOKE(app, ["data", "check", str(manifest)])
    assert "long" * 40 + ":nosuchfile" in "".join(told.stdout.split())


@pytest.mark.parametrize("command", ["check", "stats"])
def test_results_are_on_stdout_and_hints_on_stderr(
    command: str, clip: Path, tmp_path: Path
) -> None:
    manifest = write_rows(
        tmp_path / "m.jsonl", [about(clip, "good"), about(tmp_path / "gone.mp4", "gone")]
    )
    plain = INVOKE(app, ["data", command, str(manifest)])
    assert "rows" in plain.stdout
    assert "give --pr" in plain.stderr
    as_json = INVOKE(app, ["data", command, str(manifest), "--json"])
    assert json.loads(as_json.stdout)  # nothing else is there
    assert "rows" in as_json.stderr


def test_rows_are_counted_whatever_their_length_and_refused_ones_are_told(
    world: World, clip: Path, preset: Path, tmp_path: Path
) -> None:
    rows = [words("long", "red " * 3000), words("empty", " "), about(tmp_path / "gone.mp4", "gone")]
    manifest = write_rows(tmp_path / "m.jsonl", rows)
    command = ["data", "stats", str(manifest), "--json", "--workers", "1"]
    told = INVOKE(app, [*command, "--preset", str(preset)])
    found = json.loads(told.stdout.splitlines()[-1])
    assert found["total"]["tokens"] > 3000
    assert found["total"]["refused"] == 2
    assert found["refused"] == {"empty_answer": 1, "missing": 1}
    assert (
        "2 rows have no tokens, since training leaves them out: 1 empty_answer, 1 missing"
        in " ".join(told.stderr.split())
    )
    told = INVOKE(app, [*command, "--tokenizer", world.model["llm"]["name"]])
    assert json.loads(told.stdout.splitlines()[-1])["total"]["tokens"] > 3000


def mistake(command: list[str]) -> str:
    """Run a command that a user got wrong, and return the error's reason."""
    with pytest.raises(UserError) as error:
        INVOKE(app, command, catch_exceptions=False)
    return error.value.reason


def test_an_empty_manifest_is_an_error_and_the_others_are_checked(
    clip: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n")
    manifest = write_rows(tmp_path / "m.jsonl", [about(clip, "good"), words("bad", " ")])
    for command in ([str(empty), str(manifest)], [str(manifest), "--against", str(empty)]):
        result = INVOKE(app, ["data", "check", *command, "--strict", "--json"])
        checked = json.loads(result.stdout.splitlines()[-1])
        assert result.exit_code == 1
        assert checked["rows"] == {str(manifest): 2}
        assert checked["rows_with_errors"] == 2, "the row without an answer, and the manifest"
        assert {reason: r["rows"] for reason, r in checked["reasons"].items()} == {
            "empty_manifest": 1,
            "empty_answer": 1,
        }
        assert checked["mistakes"]["empty_manifest"][""]["first"] == [str(empty)]
        assert checked["to_fix"] == {}
        assert str(empty) in "".join(result.stderr.split())
    with pytest.raises(ManifestError, match=r"empty\.jsonl") as error:
        INVOKE(app, ["data", "stats", str(manifest), str(empty)], catch_exceptions=False)
    assert error.value.reason == "empty"


def test_a_missing_file_is_named_and_malformed_lines_are_counted_by_mistake(tmp_path: Path) -> None:
    away = tmp_path / "away" / "gone.mp4"
    manifest = write_rows(tmp_path / "m.jsonl", [about(away, "gone")])
    with manifest.open("a") as file:
        file.write('{"id": "cut", "messages"\n')
        for number in range(8):
            file.write(json.dumps({**words(f"odd {number}"), "colour": number}) + "\n")
        file.write('{"id": "cut" "messages": 1}\n')
        file.write(json.dumps({"id": "bare"}) + "\n")
    result = INVOKE(app, ["data", "check", str(manifest)])
    assert str(away) in "".join(result.output.split())
    checked = json.loads(INVOKE(app, ["data", "check", str(manifest), "--json"]).stdout)
    counts = {
        name: (mistake["rows"], [int(place.rsplit(" ", 1)[1]) for place in mistake["first"]])
        for name, mistake in checked["mistakes"]["malformed"].items()
    }
    assert sorted(counts.values()) == [(1, [2]), (1, [11]), (1, [12]), (8, [3, 4, 5, 6, 7])]
    assert [name for name, (rows, _) in counts.items() if rows == 8][0].startswith("field colour")
    printed = " ".join(result.output.split())
    assert all(name in printed for name in counts)
    for finding in checked["examples"]["malformed"]:
        assert "line 1" not in finding["detail"], "the line within the line"


def test_rows_to_fix_by_hand_are_named(clip: Path, tmp_path: Path) -> None:
    manifest, test = (
        write_rows(tmp_path / name, [about(clip, name)]) for name in ("m.jsonl", "t.jsonl")
    )
    for path in (manifest, test):
        with path.open("a") as file:
            file.write('{"id": "cut"\n')
    out = tmp_path / "out"
    command = [
        "data",
        "check",
        str(manifest),
        "--against",
        str(test),
        "--output",
        str(out),
        "--workers",
        "1",
    ]
    told = INVOKE(app, [*command, "--strict", "--json"])
    found = json.loads(told.stdout.splitlines()[-1])
    assert told.exit_code == 1
    assert found["to_fix"] == {str(test): [2], str(manifest): [2]}
    assert found["rows"] == {str(manifest): 2}
    assert found["reasons"]["malformed_test"] == {"severity": "error", "rows": 1}
    assert "fix these lines by hand" in " ".join(told.stderr.split())
    assert "t.jsonl line 2" in (out / "check.html").read_text()
    assert (out / "quarantine.txt").read_text() == "m.jsonl\ttest_media\n"


def test_a_row_is_shown_without_colours(preset: Path, clip: Path, tmp_path: Path) -> None:
    rows = [about(tmp_path / "gone.mp4", "gone"), about(clip, "good"), words("empty", " ")]
    manifest = write_rows(tmp_path / "m.jsonl", rows)
    command = ["data", "show", str(manifest), "--preset", str(preset)]
    shown = INVOKE(app, [*command, "--id", "good"])
    assert re.search(r"\[\[red.*\]\]", shown.stdout)
    assert "2 trained on (in [[ ]])" in shown.stdout
    coloured = INVOKE(
        app, [*command, "--id", "good"], env={"FORCE_COLOR": "1", "TERM": "xterm-256color"}
    )
    assert "[[" not in coloured.stdout
    assert "\x1b[1;32m" in coloured.stdout
    for number, reason in ((0, "missing"), (2, "empty_answer")):
        named = rf"m\.jsonl line {number + 1}, row '{rows[number]['id']}'"
        with pytest.raises(UserError, match=named) as error:
            INVOKE(app, [*command, "--row", str(number)], catch_exceptions=False)
        assert error.value.reason == reason


def test_overrides_change_the_preset(preset: Path, clip: Path, tmp_path: Path) -> None:
    manifest = write_rows(tmp_path / "m.jsonl", [about(clip, "good")])
    checked = ["data", "check", str(manifest), "--workers", "1", "--json"]
    for more, reasons in (([], set()), (["--set", "data.max_length=20"], {"too_long"})):
        told = INVOKE(app, [*checked, "--preset", str(preset), *more])
        assert json.loads(told.stdout.splitlines()[-1])["reasons"].keys() == reasons
    tokens = []
    for frames in (2, 4):
        change = ["--preset", str(preset), "--set", f"model.sampling.num_frames={frames}", "--json"]
        for command in (["stats", str(manifest), "--workers", "1"], ["show", str(manifest)]):
            found = json.loads(INVOKE(app, ["data", *command, *change]).stdout.splitlines()[-1])
            tokens.append(found["total"]["tokens"] if command[0] == "stats" else found["tokens"])
    assert tokens[0] == tokens[1] < tokens[2] == tokens[3]
    assert mistake([*checked, "--set", "data.max_length=20"]) == "no_preset"


def test_a_stage_whose_stage_before_is_not_trained_says_so(world: World, tmp_path: Path) -> None:
    later = settings(world, tmp_path / "run", "caption", model=None, init=str(tmp_path / "before"))
    later = {key: value for key, value in later.items() if value is not None}
    manifest = write_rows(tmp_path / "m.jsonl", [words("good")])
    command = [
        "data",
        "check",
        str(manifest),
        "--preset",
        str(write_preset(tmp_path / "stage2.yaml", later)),
    ]
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "before")):
        INVOKE(app, command, catch_exceptions=False)


def test_headers_and_a_model_are_refused(preset: Path, clip: Path, tmp_path: Path) -> None:
    manifest = write_rows(tmp_path / "m.jsonl", [about(clip, "good")])
    command = ["data", "check", str(manifest), "--preset", str(preset), "--decode", "headers"]
    assert mistake(command) == "headers"


def test_rows_are_counted_by_what_they_are(clip: Path, tmp_path: Path) -> None:
    interval = about(clip, "part", "two words", kind="colour")
    interval["messages"][0]["content"][0].update(start=0.25, end=0.75)
    manifest = write_rows(
        tmp_path / "m.jsonl", [about(clip, "whole"), interval, words("words", source="b")]
    )
    closed = stats([manifest])
    assert (closed.total.rows, closed.total.words, closed.total.seconds, closed.total.unknown) == (
        3,
        4,
        0.5,
        1,
    )
    opened = stats([manifest], options=ExamineOptions("headers"))
    assert opened.total.seconds == pytest.approx(1.5, abs=0.1)
    assert opened.total.unknown == 0
    assert {name: share.rows for name, share in opened.by["modality"].items()} == {
        "video": 2,
        "text": 1,
    }
    assert {name: share.rows for name, share in opened.by["kind"].items()} == {
        "(none)": 2,
        "colour": 1,
    }
    two = [{"type": "image", "image": "a.png"}, {"type": "image", "image": "b.png"}]
    assert modality(Sample.model_validate(row("x", two, "y"))) == "2 image"


def test_the_seconds_of_a_file_that_many_rows_show_count_once(clip: Path, tmp_path: Path) -> None:
    part = {"start": 0.25, "end": 0.75}
    rows = [about(clip, str(number), kind="ab"[number % 2]) for number in range(4)]
    for number in (2, 3):
        rows[number]["messages"][0]["content"][0].update(part)
    found = stats([write_rows(tmp_path / "m.jsonl", rows)], options=ExamineOptions("headers"))
    assert found.total.rows == 4
    assert found.total.seconds == pytest.approx(1.5, abs=0.1)
    for total in found.by["kind"].values():  # each kind shows the file and the part of it
        assert total.seconds == pytest.approx(1.5, abs=0.1)
    (of_manifest,) = found.by["manifest"].values()
    assert of_manifest.seconds == found.total.seconds


def test_the_commands(preset: Path, clip: Path, tmp_path: Path) -> None:
    manifest = write_rows(
        tmp_path / "m.jsonl", [about(clip, "good"), about(tmp_path / "gone.mp4", "gone")]
    )
    command = ["data", "check", str(manifest), "--output", str(tmp_path / "out"), "--workers", "1"]
    checked = INVOKE(app, [*command, "--json"])
    assert checked.exit_code == 0, checked.output
    assert json.loads(checked.stdout.splitlines()[-1])["reasons"]["missing"]["rows"] == 1
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        *("check.html", "check.json", "findings.jsonl", "journal.jsonl", "quarantine.txt")
    }
    assert INVOKE(app, [*command, "--strict"]).exit_code == 1
    look = ["data", "show", str(manifest), "--preset", str(preset)]
    shown = INVOKE(app, [*look, "--id", "good", "--output", str(tmp_path / "png"), "--json"])
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout.splitlines()[-1])["trained"] == 2
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in (tmp_path / "png").iterdir())
    assert {p.name for p in (tmp_path / "png").iterdir()} == {"frames-0.png", "sound-0.png"}
    assert mistake([*look, "--row", "7"]) == "no_row"
    assert mistake(["data", "show", str(manifest)]) == "no_model"
    # The row is looked for before a model is.
    assert mistake(["data", "show", str(manifest), "--id", "other"]) == "no_row"
    counted = INVOKE(app, ["data", "stats", str(manifest), "--json"])
    assert json.loads(counted.stdout.splitlines()[-1])["total"]["rows"] == 2
    mixed = INVOKE(app, ["data", "mix", str(preset), "train.max_steps=6", "--json"])
    drawn = json.loads(mixed.stdout.splitlines()[-1])["sources"][0]
    assert (drawn["weight"], drawn["rows"], drawn["drawn"], drawn["epochs"]) == (1.0, 2, 12, 6.0)
