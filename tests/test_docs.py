"""Every command and Python block of the pages is run or parsed, every link leads somewhere."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import runpy
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from answering import make_checkpoint
from pages import (
    ALL_PAGES,
    BLOCKS,
    PAGES,
    ROOT,
    Block,
    Command,
    anchors_of,
    blocks,
    commands,
    parse_script,
    prose_of,
)
from pydantic import BaseModel
from tiny import COLOURS, make_world, row, settings, text, write_clip, write_preset, write_rows
from tiny_runs import run
from typer.testing import CliRunner

from avllm.cli.main import app
from avllm.config import RunConfig, load_config
from avllm.data.schema import Sample
from avllm.models.encoders import check_encoder
from avllm.registry import check

README = ROOT / "README.md"
KINDS = {
    "bash",
    "python",
    "yaml",
    "json",
    "text",
}  # text: output and figures, which nobody types in
MADE_UP = {"my_parts.py"}  # files that a reader writes
EXTRAS = set(
    re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
)


# ---- blocks that are run --------------------------------------------------------------------


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the files that the pages name: runs, a world, manifests, a clip."""
    folder = tmp_path_factory.mktemp("docs")
    world = make_world(folder / "tiny", clips=4)
    runs = folder / "runs" / "quickstart"
    make_checkpoint(folder / "made").rename(make_parent(runs / "stage3"))
    rules = [["^connector", 1e-2], ["^objectives", 1e-2], [".*", None]]
    run(settings(world, runs / "stage1", "align", train__max_steps=2, trainable=rules))
    (runs / "world").symlink_to(world.captions.parent)
    world.captions.with_name("captions_test.jsonl").write_bytes(world.captions.read_bytes())
    world.questions.with_name("test.jsonl").write_bytes(world.questions.read_bytes())
    write_clip(make_parent(runs / "world" / "clips" / "test-000000.mp4"), COLOURS["red"], 300.0)
    write_clip(folder / "clip.mp4", COLOURS["blue"], 1500.0)
    write_clip(make_parent(folder / "data" / "clips" / "a.mp4"), COLOURS["green"], 300.0)
    asked = [{"type": "video", "video": "clips/a.mp4"}, text("what colour is it ?")]
    for name in "ab":
        write_rows(
            folder / "data" / f"{name}.jsonl", [row("1" if name == "a" else "2", asked, "green")]
        )
    here = [{"type": "video", "video": "clip.mp4"}, text("what colour is it ?")]
    write_rows(folder / "requests.jsonl", [row("1", here, "blue"), row("2", here, "blue")])
    chosen = settings(
        world,
        folder / "runs" / "mine",
        "align",
        data__cache=str(folder / "features"),
        trainable=rules,
    )
    write_preset(folder / "preset.yaml", chosen)
    return folder


def make_parent(path: Path) -> Path:
    """Make the folder that a path lies in and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@pytest.fixture
def inside(example: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Work in the example folder."""
    monkeypatch.chdir(example)
    monkeypatch.setenv("AVLLM_CACHE", str(tmp_path))
    return example


@pytest.mark.parametrize("command", commands(run=True), ids=str)
def test_a_command_runs(command: Command, inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *arguments = command.words
    if program == "avllm":
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, f"{done.output}{done.exception!r}"
    else:
        assert program == "python", f"{program} is run by no test"
        monkeypatch.setattr(sys, "argv", arguments)
        runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")


@pytest.mark.parametrize("block", blocks("python", run=True), ids=str)
def test_a_python_block_runs(block: Block, inside: Path) -> None:
    exec(compile(block.text, str(block), "exec"), {"__name__": "example"})


def test_a_part_of_ones_own_can_be_named_in_a_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The class of compose.md, in the module that the page names: its grid is what it makes."""
    import torch

    from avllm.models.connector import Connector
    from avllm.tokens import Grid, Tokens

    (block,) = [b for b in blocks("python") if "class Halve" in b.text]
    (tmp_path / "my_parts.py").write_text(block.text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    specs = [{"type": "my_parts:Halve", "stream": "video"}, {"type": "linear", "stream": "video"}]
    connector = Connector(specs, {"video": 4}, 8)
    span = torch.arange(10.0).reshape(1, 5, 2)
    tokens = Tokens(torch.randn(1, 5, 3, 4), torch.ones(1, 5, 3, dtype=torch.bool), span)
    made = connector({"video": tokens})["video"]
    grid = connector.output_grid({"video": Grid(span[0], tokens.mask[0])})["video"]
    assert made.x.shape == (1, 3, 3, 8)
    assert torch.equal(made.span[0], grid.span)
    assert torch.equal(made.mask[0], grid.mask)


# ---- blocks that are parsed -----------------------------------------------------------------


def test_every_block_is_of_a_kind_that_is_tested() -> None:
    assert [f"{b} is {b.kind!r}" for b in BLOCKS if b.kind not in KINDS] == []
    marked = sum(path.read_text(encoding="utf-8").count("<!-- run -->") for path in PAGES)
    assert marked == sum(b.run for b in BLOCKS), "a mark is not followed by a block"
    assert {b.kind for b in BLOCKS if b.run} == {"bash", "python"}


@pytest.mark.parametrize("command", commands(), ids=str)
def test_a_command_is_accepted(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options exist, values have the right type, and the files of the repository are there."""
    program, *arguments = command.words
    assert program in PROGRAMS, f"{command.block}: {program} is checked by no test"
    PROGRAMS[program](arguments, monkeypatch)


def parse_avllm(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse the arguments of the ``avllm`` command."""
    del monkeypatch
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands") and not arguments[0].startswith("-"):
        name, *arguments = arguments
        assert name in command.commands, f"avllm has no command {name}"
        command = command.commands[name]
    if arguments != ["--help"]:
        assert not hasattr(command, "commands"), "a group of commands without a command"
        command.make_context("avllm", arguments)


def parse_python(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse the arguments of a script of this repository; presets are loaded."""
    script, *rest = arguments
    path = ROOT / script
    assert path.is_file(), f"{script} is not there"
    if path.parent == ROOT / "train":
        preset, *overrides = rest
        load_config(ROOT / preset, overrides)
    if script == "serve/api.py":  # a page of example code without options
        assert len(rest) > 2
    else:
        parse_script(path, rest, monkeypatch)


def parse_accelerate(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse ``accelerate launch``, then the script."""
    from accelerate.commands.launch import launch_command_parser

    assert arguments[0] == "launch"
    found = launch_command_parser().parse_args(arguments[1:])
    assert (ROOT / found.config_file).is_file()
    parse_python([found.training_script, *found.training_script_args], monkeypatch)


def parse_torchrun(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse ``torchrun``, then the script."""
    from torch.distributed.run import get_args_parser

    found = get_args_parser().parse_args(arguments)
    parse_python([found.training_script, *found.training_script_args], monkeypatch)


def parse_bash(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Look for the script; the quickstart hands its arguments to a Python script."""
    script, *rest = arguments
    assert (ROOT / script).is_file()
    if rest:
        assert script == "scripts/quickstart.sh"
        parse_python(["scripts/toy_world/quickstart.py", *rest], monkeypatch)


def parse_pip(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Look for the files and the extras."""
    del monkeypatch
    assert arguments[0] == "install"
    for word in arguments[1:]:
        extras = re.search(r"\[(.+)\]", word)
        assert extras is None or set(extras[1].split(",")) <= EXTRAS
        assert not word.endswith(".txt") or (ROOT / word).is_file()


def parse_source(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Accept the environment that scripts/environment.sh makes."""
    del monkeypatch
    assert arguments == [".venv/bin/activate"]


PROGRAMS = {
    "avllm": parse_avllm,
    "python": parse_python,
    "accelerate": parse_accelerate,
    "torchrun": parse_torchrun,
    "bash": parse_bash,
    "pip": parse_pip,
    "source": parse_source,
}


PRESET: dict[str, Any] = {  # what a block leaves out
    "stage": "align",
    "output": "run",
    "model": {
        "llm": {"name": "llm"},
        "encoders": {"video": {"type": "siglip", "name": "vision"}},
        "connector": [{"type": "linear", "stream": "video"}],
    },
    "trainable": [[".*", 1e-3]],
    "objectives": [{"type": "next_token"}],
    "data": {"train": "data/a.jsonl"},
    "train": {"max_steps": 1},
}


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_a_yaml_block_is_valid(block: Block) -> None:
    """A block is a preset, or sections of one; of `model` and `data` it may show some keys."""
    given = yaml.safe_load(block.text)
    if "stage" not in given:
        inner = {key: PRESET[key] | given.get(key, {}) for key in ("model", "data")}
        given = PRESET | given | inner
        if "init" in given:
            del given["model"]
    config = RunConfig.model_validate(given)
    for spec in config.objectives:
        check("objectives", {key: value for key, value in spec.items() if key != "weight"})
    if config.extend is not None:
        for stream, spec in config.extend.encoders.items():
            check_encoder(stream, spec)
    if config.model is not None:
        for stream, spec in config.model.encoders.items():
            check_encoder(stream, spec)
        for spec in config.model.connector:
            check("adapters", spec)
        check("layouts", config.model.layout)
        for kind, option in (("fusions", "fusion"), ("time_codecs", "time_codec")):
            if getattr(config.model, option, None) is not None:
                check(kind, getattr(config.model, option))


@pytest.mark.parametrize("block", blocks("json"), ids=str)
def test_a_json_block_is_a_sample(block: Block) -> None:
    Sample.model_validate_json(block.text)


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_a_python_block_names_what_exists(block: Block) -> None:
    tree = ast.parse(block.text)
    names: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.asname or a.name: importlib.import_module(a.name) for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            names |= {a.asname or a.name: getattr(module, a.name) for a in node.names}
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in names
        ):
            owner = names[node.value.id]
            assert hasattr(owner, node.attr), f"{block}: {node.value.id} has no {node.attr}"


# ---- links, and what the text names ---------------------------------------------------------


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors_of(path), f"{page.name}: no heading for {target}"


def test_every_page_is_linked_from_the_readme() -> None:
    linked = re.findall(r"\]\(docs/(\w+\.md)\)", README.read_text(encoding="utf-8"))
    assert {p.name for p in PAGES[1:]} == set(linked)


def settings_paths(section: type[BaseModel], before: str = "") -> Iterator[str]:
    """Yield the dotted names of all settings."""
    for name, field in section.model_fields.items():
        yield before + name
        for inner in [field.annotation, *getattr(field.annotation, "__args__", ())]:
            if inspect.isclass(inner) and issubclass(inner, BaseModel):
                yield from settings_paths(inner, f"{before}{name}.")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_settings_and_files_that_the_text_names_exist(page: Path) -> None:
    known = set(settings_paths(RunConfig)) | {"train.lr"}  # named as a mistake
    for code in re.findall(r"`([^`\n]+)`", prose_of(page)):
        for key in re.findall(r"(?<![\w./])((?:train|data|model)\.[a-z_]+(?:\.[a-z_]+)*)", code):
            assert key in known, f"{page.name}: `{key}` is no setting"
        place = re.match(r"(?:avllm|train|serve|scripts|data_recipes|docs|tests)/[\w./-]*", code)
        if place:
            assert (ROOT / place[0]).exists(), f"{page.name}: {place[0]} is not there"


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_files_that_a_page_names_exist(page: Path) -> None:
    """Python files, by their path in the repository, in the package, or beside the page."""
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"(?<![\w./*])([a-z_][\w/]*\.py)\b", text):
        if name not in MADE_UP and "NAME" not in name:
            folders = [ROOT, ROOT / "avllm", ROOT / "data_recipes", page.parent]
            places = [*(folder / name for folder in folders), *ROOT.glob(f"avllm/**/{name}")]
            assert any(place.is_file() for place in places), f"{page.name}: no file {name}"


def test_every_command_is_documented() -> None:
    shown = {tuple(command.words[1:3]) for command in commands() if command.words[0] == "avllm"}
    first = {words[0] for words in shown}
    root: Any = typer.main.get_command(app)
    for name, command in root.commands.items():
        if hasattr(command, "commands"):
            assert {(name, inner) for inner in command.commands} <= shown
        else:
            assert name in first, f"no page shows avllm {name}"


# ---- README, pictures, reference ------------------------------------------------------------


def test_every_script_has_a_line_in_their_readme() -> None:
    lines = (ROOT / "scripts" / "README.md").read_text(encoding="utf-8")
    names = [
        f"{path.name}/" if path.is_dir() else path.name
        for path in (ROOT / "scripts").iterdir()
        if path.name not in ("README.md", "__pycache__")
    ]
    assert [name for name in names if f"`{name}`" not in lines] == []


def test_the_readme_is_short() -> None:
    assert README.read_text(encoding="utf-8").count("\n") <= 110


def test_pictures_are_small_and_described() -> None:
    drawn = ElementTree.parse(ROOT / "docs" / "way_of_a_clip.svg").getroot()
    names = {child.tag.rpartition("}")[2] for child in drawn}
    assert {"title", "desc"} <= names
    for picture in (ROOT / "docs").glob("*.png"):
        assert picture.stat().st_size < 150_000, f"{picture.name} is large for a page"
    for page in PAGES:
        assert "![](" not in page.read_text(encoding="utf-8"), (
            f"{page.name}: a picture without a text"
        )


def test_the_reference_builds_strictly(tmp_path: Path) -> None:
    pytest.importorskip("pdoc", reason="pdoc is not installed (pip install 'avllm[docs]')")
    call = [sys.executable, "scripts/api_reference.py", str(tmp_path)]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "load" in (tmp_path / "avllm.html").read_text(encoding="utf-8")
    for module in ("avllm/inference/chat", "avllm/adapters/qformer", "avllm/config"):
        assert (tmp_path / f"{module}.html").is_file()
