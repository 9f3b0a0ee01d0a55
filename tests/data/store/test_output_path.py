"""A path that cannot be written is found before any work, by every command that writes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from avllm.cli.main import app
from avllm.data.store.output_path import OutputPathError, output_file, output_folder
from avllm.data.store.storage import StoreError


def test_a_good_path_gets_its_folder_and_no_file(tmp_path: Path) -> None:
    assert output_file(tmp_path / "a" / "b.json") == tmp_path / "a" / "b.json"
    assert list((tmp_path / "a").iterdir()) == []
    assert output_folder(tmp_path / "c" / "d").is_dir()


def test_bad_paths_are_named(tmp_path: Path) -> None:
    given = tmp_path / "rows.jsonl"
    given.write_text("x")
    for path, reason in [
        (tmp_path, "is_folder"),
        (tmp_path / "." / "rows.jsonl", "is_input"),
        (given / "b.json", "is_file"),
        (Path("/proc/none/b.json"), "no_folder"),
    ]:
        with pytest.raises(OutputPathError) as refused:
            output_file(path, [None, given])
        assert (refused.value.reason, "\n" in str(refused.value)) == (reason, False)
    with pytest.raises(OutputPathError) as refused:
        output_folder(given)
    assert refused.value.reason == "is_file"
    with pytest.raises(StoreError):
        output_file("s3://bucket/b.json")
    assert given.read_text() == "x"


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_what_is_read_only_is_named(tmp_path: Path) -> None:
    (tmp_path / "b.json").touch(0o444)
    tmp_path.chmod(0o555)
    for name in ("a.json", "b.json"):
        with pytest.raises(OutputPathError) as refused:
            output_file(tmp_path / name)
        assert refused.value.reason == "read_only"
    tmp_path.chmod(0o755)


@pytest.mark.parametrize(
    "command",
    [
        "eval no-model {rows} --output {folder}",
        "eval no-model {rows} --output {rows}",
        "eval no-model {rows} --predictions {rows}/x",
        "eval no-model {rows} --report {folder}",
        "eval no-model {rows} --output {folder}/x --predictions {folder}/x",
        "eval no-model {rows} --cache {rows}",
        "retrieve no-model {rows} --output {folder}",
        "data check {rows} --checkpoint no-model --output {rows}",
        "data show {rows} --checkpoint no-model --output {rows}",
        "data pack {rows} --output {rows}",
        "ckpt import video_llama --llm no-model --output {rows}/checkpoint",
    ],
)
def test_commands_check_their_outputs_first(command: str, tmp_path: Path) -> None:
    """The model, which does not exist, is not what they complain about."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    arguments = [word.format(rows=rows, folder=tmp_path) for word in command.split()]
    error = CliRunner().invoke(app, arguments).exception
    assert isinstance(error, OutputPathError), error
    assert rows.read_text() == "{}\n"
