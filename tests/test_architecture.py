"""The house keeps its shape: floors, no sideways imports, light imports, short files."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {
    **dict.fromkeys(
        ["__init__", "registry", "errors", "precision", "config", "tokens", "times", "distributed"],
        0,
    ),
    **dict.fromkeys(
        ["config_data", "config_errors", "config_model", "config_peft", "config_values"], 0
    ),
    **dict.fromkeys(["log", "weights", "yaml_files", "on_ray", "streams", "published"], 0),
    **dict.fromkeys(
        ["data", "encoders", "adapters", "layouts", "fusions", "decoders", "time_codecs"], 1
    ),
    **dict.fromkeys(["models", "objectives", "recipes"], 2),
    **dict.fromkeys(["training", "inference", "text_models", "reference"], 3),
    **dict.fromkeys(["evaluation", "cli", "__main__"], 4),
}
SCRIPTS = ("train", "serve", "data_recipes", "scripts")
FORBIDDEN = {"utils.py", "helpers.py", "misc.py", "common.py"}
# The command line calls what evaluates; they share a floor but not a side.
ALLOWED = {("cli", "evaluation"), ("__main__", "cli")}
LARGEST_FOLDER = 16  # files of a folder, its __init__ not counted
PACKAGE = sorted((ROOT / "avllm").rglob("*.py"))
OUTSIDE = sorted(p for folder in SCRIPTS for p in (ROOT / folder).rglob("*.py"))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def room(path: Path) -> str:
    """The part of the house that a file of the package belongs to."""
    return path.relative_to(ROOT / "avllm").parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import anywhere in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, (
                f"{name(path)} line {node.lineno}: a relative import; write it out"
            )
            yield node.lineno, node.module or ""
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def avllm_rooms(path: Path) -> Iterator[tuple[int, str]]:
    for line, module in imported(path):
        pieces = module.split(".")
        if pieces[0] == "avllm" and len(pieces) > 1 and pieces[1] in FLOORS:
            yield line, pieces[1]


def test_every_room_has_a_floor() -> None:
    assert {room(p) for p in PACKAGE} <= set(FLOORS)


@pytest.mark.parametrize("path", PACKAGE, ids=name)
def test_imports_go_down_and_never_sideways(path: Path) -> None:
    own = room(path)
    for line, other in avllm_rooms(path):
        below = FLOORS[other] < FLOORS[own] or FLOORS[other] == FLOORS[own] == 0
        assert below or other == own or (own, other) in ALLOWED, (
            f"{name(path)} line {line}: {own} (floor {FLOORS[own]}) imports {other} "
            f"(floor {FLOORS[other]})"
        )


def test_the_package_never_imports_scripts() -> None:
    for path in PACKAGE:
        assert not {m.split(".")[0] for _, m in imported(path)} & set(SCRIPTS), name(path)


def test_scripts_import_only_the_package_and_their_own_folder() -> None:
    """Scripts directly under train/, serve/, data_recipes/ and scripts/ import no sibling."""
    for path in OUTSIDE:
        folder = path.relative_to(ROOT).parts[0]
        siblings = {p.stem for p in (ROOT / folder).glob("*.py")} | set(SCRIPTS)
        if path.parent != ROOT / folder:
            siblings |= {p.name for p in (ROOT / folder).iterdir() if p.is_dir()}
        tops = {m.split(".")[0] for _, m in imported(path)}
        assert not tops & siblings, f"{name(path)} imports {sorted(tops & siblings)}"
        assert path.name != "__init__.py", (
            f"{name(path)}: scripts are run by path, they are no package"
        )


@pytest.mark.parametrize("path", [p for p in PACKAGE if p.name == "__init__.py"], ids=name)
def test_package_files_import_nothing_heavy(path: Path) -> None:
    light = {"__future__", "importlib", "typing"}
    tops = {m.split(".")[0] for _, m in imported(path)}
    assert tops <= light, f"{name(path)} imports {sorted(tops - light)}"


def test_importing_the_package_and_the_command_loads_nothing_heavy() -> None:
    code = (
        "import sys, avllm, avllm.cli.main, avllm.config, avllm.registry; "
        "heavy = ('torch', 'transformers', 'gradio', 'numpy', 'av', 'peft'); "
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"


def imports_by_module() -> dict[str, set[str]]:
    """The modules of the package that each module imports, also lazily or for types alone."""
    inner = [p for p in PACKAGE if p.name != "__init__.py"]  # a package's own file imports nothing
    files = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in inner}
    return {
        module: {m for _, m in imported(path)} & files.keys() - {module}
        for module, path in files.items()
    }


def test_no_import_circles() -> None:
    """Leave out, again and again, what imports nothing that is left: circles alone remain."""
    graph = imports_by_module()
    while leaves := [module for module, targets in graph.items() if not targets & graph.keys()]:
        for module in leaves:
            del graph[module]
    assert not graph, f"import circles among or above {sorted(graph)[:6]}"


def test_no_folder_is_crowded() -> None:
    folders = Counter(
        p.parent for p in PACKAGE if p.name != "__init__.py" and p.parent != ROOT / "avllm"
    )
    crowded = {name(folder): count for folder, count in folders.items() if count > LARGEST_FOLDER}
    rooms_of_parts = {
        f"avllm/{kind}" for kind in ("adapters", "encoders", "layouts", "objectives", "fusions")
    }
    assert not crowded.keys() - rooms_of_parts, f"{crowded}; the limit is {LARGEST_FOLDER} files"


def test_training_does_not_import_the_check() -> None:
    """Of avllm/data, what lies beside training's own files is imported by training."""
    graph = imports_by_module()
    seen, pending = (
        set(),
        ["avllm.training.trainer", "avllm.inference.chat", "avllm.training.features_ray"],
    )
    while pending:
        module = pending.pop()
        if module not in seen:
            seen.add(module)
            pending += graph[module]
    assert not {
        m for m in seen if m.startswith(("avllm.data.check", "avllm.recipes", "avllm.text_models"))
    }
    flat = {m for m in graph if m.startswith("avllm.data.") and m.count(".") == 2}
    assert flat <= seen, f"training imports none of {sorted(flat - seen)}"


def test_a_class_name_occurs_once() -> None:
    names: Counter[str] = Counter()
    for path in PACKAGE:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names.update(node.name for node in tree.body if isinstance(node, ast.ClassDef))
    assert [name for name, count in names.items() if count > 1] == []


def test_no_drawer_for_everything() -> None:
    found = [name(p) for p in [*PACKAGE, *OUTSIDE] if p.name in FORBIDDEN]
    assert not found, f"{found}: say what is in the file by its name"


@pytest.mark.parametrize("path", [*PACKAGE, *OUTSIDE], ids=name)
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lines = text.count("\n")
    assert lines <= 400, f"{name(path)} has {lines} lines; the limit is 400"
    for node, length in functions(text):
        assert length <= 60, (
            f"{name(path)} line {node.lineno}: {node.name} has {length} lines; the limit is 60"
        )


def test_functions_are_short_in_the_middle() -> None:
    lengths = [length for p in PACKAGE for _, length in functions(p.read_text(encoding="utf-8"))]
    assert statistics.median(lengths) < 15


def functions(text: str) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, int]]:
    """Functions and their lengths; a docstring, being no code, does not count."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            doc = isinstance(first, ast.Expr) and isinstance(
                getattr(first, "value", None), ast.Constant
            )
            words = (first.end_lineno or 0) - first.lineno + 1 if doc else 0
            yield node, (node.end_lineno or 0) - node.lineno + 1 - words
