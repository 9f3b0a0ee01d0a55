"""Test every recipe: rows are valid, missing media are named, drops are counted, runs are equal.

A recipe needs a function with its name in a ``sources_*.py`` of this folder that writes its layout
into a folder: a few rows with all their media, and at least one row to be dropped. ``OPTIONS =
{recipe: {...}}`` there gives options. Recipes that make media have separate tests.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from avllm.data.manifest import read_manifest
from avllm.data.schema import resolve
from avllm.recipes.about import layout_lines
from avllm.recipes.frame import Dataset, RecipeError, RecipeReport, make
from avllm.recipes.table import page, read_about

HERE = Path(__file__).resolve().parent
RECIPES = HERE.parents[1] / "data_recipes"


def names_of(path: Path) -> set[str]:
    """Return the names that a file defines, without importing it."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def makes_media(path: Path) -> bool:
    """Return whether ``rows`` asks for the output folder."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == "rows":
            arguments = [*node.args.args, *node.args.kwonlyargs]
            return "output" in {argument.arg for argument in arguments}
    return False


FRAMED = [path for path in sorted(RECIPES.glob("*.py")) if {"ABOUT", "rows"} <= names_of(path)]


def load(path: Path) -> ModuleType:
    """Return a file as a module, under a separate name."""
    name = f"recipe_contract_{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def source_of(name: str) -> tuple[Callable[[Path], None], dict[str, Any]]:
    """Return the function that writes a recipe's source, and the options of the run."""
    for path in sorted(HERE.glob("sources_*.py")):
        if name in names_of(path):
            module = load(path)
            return getattr(module, name), getattr(module, "OPTIONS", {}).get(name, {})
    raise AssertionError(
        f"no sources_*.py in tests/data_recipes has a function {name}(source: Path)"
    )


class Ready:
    """A recipe with its source written."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.module = load(RECIPES / f"{name}.py")
        self.source = folder / "source"
        self.about: Dataset = self.module.ABOUT
        write, self.options = source_of(name)
        self.source.mkdir()
        write(self.source)

    def run(self, output: Path) -> RecipeReport:
        return make(
            self.about, self.module.rows, self.source, output, name=self.name, **self.options
        )


@pytest.fixture(params=[path.stem for path in FRAMED if not makes_media(path)])
def recipe(request: pytest.FixtureRequest, tmp_path: Path) -> Ready:
    return Ready(request.param, tmp_path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rows_are_valid_and_all_is_accounted_for(recipe: Ready, tmp_path: Path) -> None:
    output = tmp_path / "out"
    report = recipe.run(output)
    account = json.loads((output / "recipe.json").read_text(encoding="utf-8"))
    assert account["recipe"] == recipe.name
    assert account["rows"] == dict(report.rows)
    assert account["missing_files"] == report.missing_files == 0, (
        output / "missing.txt"
    ).read_text()
    for split, count in report.rows.items():
        samples = read_manifest(output / f"{split}.jsonl")
        assert len(samples) == count > 0
        assert all(s.licence for s in samples)
        assert all(s.source != "unknown" for s in samples)
        assert all(s.answer and s.answer.strip() for s in samples)
        assert all(resolve(part, output).is_file() for s in samples for part in s.media)
    dropped = read_lines(output / "dropped.jsonl")
    assert dropped, f"the source of {recipe.name} has no row to be dropped"
    assert len(dropped) == report.dropped.total()
    assert "invalid_row" not in report.dropped
    assert all(d["reason"] in report.dropped and d["where"] for d in dropped)


def test_a_second_run_writes_the_same_bytes(recipe: Ready, tmp_path: Path) -> None:
    output = tmp_path / "out"
    recipe.run(output)
    first = {p.relative_to(output): p.read_bytes() for p in output.rglob("*.json*")}
    recipe.run(output)
    assert {p.relative_to(output): p.read_bytes() for p in output.rglob("*.json*")} == first
    assert not list(output.rglob("*.partial"))


def test_a_missing_media_file_is_named_and_its_rows_are_dropped(
    recipe: Ready, tmp_path: Path
) -> None:
    full = recipe.run(tmp_path / "full")
    split = next(iter(full.rows))
    gone = resolve(
        read_manifest(tmp_path / "full" / f"{split}.jsonl")[0].media[0], tmp_path / "full"
    ).resolve()
    gone.unlink()
    try:
        report = recipe.run(tmp_path / "out")
    except RecipeError as error:  # it was the only row
        assert error.reason == "no_rows"  # noqa: PT017
        assert "missing_media" in str(error)  # noqa: PT017
        assert str(tmp_path / "out" / "missing.txt") in str(error)  # noqa: PT017
        assert (tmp_path / "out" / "missing.txt").read_text(encoding="utf-8").count("\n") == 1
        assert (
            len(read_lines(tmp_path / "out" / "dropped.jsonl"))
            == full.rows.total() + full.dropped.total()
        )
        return
    assert report.missing_files == 1
    assert report.dropped["missing_media"] == full.rows.total() - report.rows.total() > 0
    (named,) = (tmp_path / "out" / "missing.txt").read_text(encoding="utf-8").splitlines()
    assert Path(named).stem.split("_")[0] in gone.stem or gone.stem in named


def test_a_row_of_a_table_with_too_few_fields_is_dropped_and_ends_nothing(
    recipe: Ready, tmp_path: Path
) -> None:
    whole = recipe.run(tmp_path / "whole")
    tables = sorted(path for path in recipe.source.rglob("*") if path.suffix in (".csv", ".tsv"))
    for number, table in enumerate(tables):
        with table.open("a", encoding="utf-8") as file:
            file.write("7\n")
        report = recipe.run(tmp_path / str(number))
        assert report.rows == whole.rows
        assert report.dropped["malformed_row"] == whole.dropped["malformed_row"] + number + 1, (
            table.name
        )


@pytest.mark.parametrize("path", FRAMED, ids=lambda path: path.stem)
def test_a_source_without_its_files_is_refused(path: Path, tmp_path: Path) -> None:
    module = load(path)
    required = [line.patterns for line in layout_lines(module.ABOUT.layout) if not line.optional]
    assert required, f"the layout of {path.stem} asks for nothing"
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError) as caught:
        make(module.ABOUT, module.rows, tmp_path / "empty", tmp_path / "out", name=path.stem)
    assert required[0][0] in str(caught.value)
    assert module.ABOUT.where in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", FRAMED, ids=lambda path: path.stem)
def test_every_field_of_about_is_filled(path: Path) -> None:
    about = read_about(path)
    assert about is not None
    assert about == load(path).ABOUT
    assert all([about.title, about.licence, about.size, about.where, about.layout, about.citation])


def test_every_recipe_is_in_the_table() -> None:
    readme = (RECIPES / "README.md").read_text(encoding="utf-8")
    assert readme == page(readme, RECIPES), "run: python -m avllm.recipes.table data_recipes"
    assert all(f"`{path.name}`" in readme for path in RECIPES.glob("*.py"))
