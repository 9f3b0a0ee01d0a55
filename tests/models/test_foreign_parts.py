"""Loading a checkpoint imports nothing that it names, unless the caller allows it by name."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import World, make_world, settings
from typer.testing import CliRunner

from avllm.cli.main import app
from avllm.config import RunConfig
from avllm.config_model import ModelConfig
from avllm.errors import UserError
from avllm.inference.chat import Chat
from avllm.models.building.described import stage_processor
from avllm.models.building.placeholders import load_tokenizer
from avllm.models.checkpoint import save_checkpoint
from avllm.models.loading.digests import ALL_FILES, write_manifest
from avllm.models.loading.foreign_parts import ForeignPartError
from avllm.models.modeling_avllm import AVLLM
from avllm.models.processing_avllm import AVProcessor
from avllm.training.start import build_parts
from avllm.training.task import load_objectives

PLANTED = """
from pathlib import Path
from avllm.adapters.linear import Linear
Path(__file__).with_name("ran").touch()
class Planted(Linear): pass
"""
PART = "planted_in_checkpoint:Planted"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), clips=1)


@pytest.fixture(scope="module")
def good(world: World) -> Path:
    """A checkpoint of the tiny world."""
    description = ModelConfig.model_validate(world.model)
    tokenizer, ids = load_tokenizer(description)
    model = AVLLM.from_backbones(description, ids)
    save_checkpoint(model, AVProcessor.from_model(model, tokenizer), world.root / "good", [])
    return world.root / "good"


@pytest.fixture
def planted(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the checkpoint, with a module beside it that leaves a file when it is imported."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(good, folder)
    (tmp_path / "planted_in_checkpoint.py").write_text(PLANTED, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    sys.modules.pop("planted_in_checkpoint", None)


def change(path: Path, edit: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    edit(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    if (path.parent / "manifest.json").is_file():
        write_manifest(path.parent, ALL_FILES)  # as somebody would who wants it to load


def ran(folder: Path) -> bool:
    return (folder.parent / "ran").exists()


PLACES: dict[str, Callable[[Any], object]] = {
    "encoder": lambda c: c["encoders"]["audio"].update(type=PART),
    "adapter": lambda c: c["connector"][1].update(type=PART),
    "layout": lambda c: c.update(layout={"type": PART}),
    "fusion": lambda c: c.update(fusion={"type": PART, "streams": ["audio"]}),
    "selector": lambda c: c.update(selector={"type": PART}),
    "time codec": lambda c: c.update(time_codec={"type": PART}),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_part_that_the_config_names_is_refused_before_it_is_imported(
    planted: Path, place: str
) -> None:
    change(planted / "config.json", PLACES[place])
    for load in (AVLLM.from_pretrained, AVProcessor.from_pretrained, Chat.load):
        with pytest.raises(ForeignPartError) as caught:
            load(planted)
        assert caught.value.parts == [PART]
        assert PART in str(caught.value)
        assert not ran(planted)


@pytest.mark.parametrize("part", [PART, "avllm.__main__:app", "os:system", "avllm.encoders.x.y:Z"])
def test_a_preprocessor_is_refused_before_it_is_imported(planted: Path, part: str) -> None:
    change(
        planted / "processor_config.json", lambda c: c["preprocessors"]["audio"].update(part=part)
    )
    with pytest.raises(ForeignPartError):
        AVProcessor.from_pretrained(planted)
    assert not ran(planted)


def test_an_objective_of_the_last_stage_is_refused_before_it_is_imported(
    good: Path, planted: Path
) -> None:
    shutil.copy(planted / "trained.safetensors", planted / "objectives.safetensors")
    stage = {"stage": "align", "settings": {"objectives": [{"type": PART}]}}
    change(planted / "manifest.json", lambda c: c.update(stages=[stage]))
    with pytest.raises(ForeignPartError):
        load_objectives(AVLLM.from_pretrained(good), planted)
    assert not ran(planted)


def test_a_part_that_is_allowed_by_name_loads_and_no_other_does(planted: Path) -> None:
    change(planted / "config.json", PLACES["adapter"])
    with pytest.raises(ForeignPartError):
        Chat.load(planted, allow_parts=["planted_in_checkpoint:Other"])
    assert not ran(planted)
    chat = Chat.load(planted, allow_parts=[PART])
    assert [type(part).__name__ for part in chat.model.connector] == ["MLP", "Planted"]
    assert ran(planted)


def test_commands_allow_parts_by_an_option(planted: Path, world: World) -> None:
    change(planted / "config.json", PLACES["adapter"])
    commands = [
        ["ask", str(planted), "what ?"],
        ["eval", str(planted), str(world.questions)],
        ["retrieve", str(planted), str(world.captions)],
        ["data", "show", str(world.captions), "--checkpoint", str(planted)],
    ]
    for command in commands:
        assert isinstance(CliRunner().invoke(app, command).exception, ForeignPartError), command
        assert not ran(planted)
    allowed = CliRunner().invoke(app, [*commands[0], "--allow-part", PART])
    assert allowed.exit_code == 0, allowed.output


def test_a_stage_allows_parts_of_its_init_in_the_preset(
    planted: Path, world: World, tmp_path: Path
) -> None:
    change(planted / "config.json", PLACES["adapter"])
    stage = settings(world, tmp_path / "run", init=str(planted), model=None)
    for build in (build_parts, stage_processor):
        with pytest.raises(ForeignPartError):
            build(RunConfig.model_validate(stage))
        assert not ran(planted)
    stage["allow_parts"] = [PART]
    assert (
        type(build_parts(RunConfig.model_validate(stage)).model.connector[1]).__name__ == "Planted"
    )


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_that_transformers_would_import_is_refused(planted: Path, file: str) -> None:
    code = {"AutoConfig": "planted.Config", "AutoTokenizer": ["planted.Tokenizer", None]}
    (planted / "planted.py").write_text(PLANTED, encoding="utf-8")
    change(
        planted / file, lambda c: (c["llm"]["config"] if "llm" in c else c).update(auto_map=code)
    )
    with pytest.raises(UserError):
        Chat.load(planted)
    assert not (planted / "ran").exists()


@pytest.mark.parametrize("name", ["llm", "siglip"])
def test_a_backbone_that_brings_code_is_refused(world: World, tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    shutil.copytree(world.root / name, folder)
    (folder / "planted.py").write_text(PLANTED, encoding="utf-8")
    code = {"AutoConfig": "planted.Planted", "AutoModelForCausalLM": "planted.Planted"}
    change(folder / "config.json", lambda c: c.update(auto_map=code, model_type="planted"))
    description = world.model
    if name == "llm":
        description["llm"] = {"name": str(folder)}
    else:
        description["encoders"]["video"]["name"] = str(folder)
    with pytest.raises(UserError):
        load_tokenizer(ModelConfig.model_validate(description))
    assert not (folder / "ran").exists()
