"""A stage, its feature cache and retrieval find backbones of `init` in the folders given."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import make_world, settings, write_preset
from tiny_runs import run
from typer.testing import CliRunner

from avllm.cli.main import app
from avllm.config import RunConfig
from avllm.data.store.output_path import OutputPathError
from avllm.models.checkpoint_format import CheckpointError
from avllm.training.start import build_parts


def test_commands_of_training_take_their_folders(tmp_path: Path) -> None:
    world = make_world(tmp_path / "world", clips=2)
    run(settings(world, tmp_path / "first", "align", train__max_steps=1))
    for folder in (world.llm, world.video, world.audio):
        folder.rename(folder.with_name(f"moved-{folder.name}"))
    moved = {
        "llm": str(world.llm.with_name("moved-llm")),
        "video": str(world.video.with_name("moved-siglip")),
        "audio": str(world.audio.with_name("moved-whisper")),
    }
    options = []
    for part, folder in moved.items():
        options += ["--backbone", f"{part}={folder}"]

    second = settings(world, tmp_path / "second", data__cache=str(tmp_path / "features"))
    del second["model"], second["init_from_scratch"]
    second["init"] = str(tmp_path / "first")
    with pytest.raises(CheckpointError, match="--backbone"):
        build_parts(RunConfig.model_validate(second))
    build_parts(RunConfig.model_validate(second | {"backbones": moved}))

    preset = str(write_preset(tmp_path / "second.yaml", second))
    manifest = str(world.captions)
    bad = CliRunner().invoke(app, ["data", "encode", preset, f"data.cache={manifest}"])
    assert isinstance(bad.exception, OutputPathError)  # and not about the backbones
    for command in (["data", "encode", preset], ["retrieve", second["init"], manifest]):
        result = CliRunner().invoke(app, [*command, *options])
        assert result.exit_code == 0, f"{result.output}{result.exception!r}"
