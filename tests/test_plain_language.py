"""Check docstrings, comments, messages and documentation for words that readers stumble over."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("avllm", "train", "serve", "scripts", "data_recipes", "docs")
PAGES = ("README.md", "CHANGELOG.md", "ARCHITECTURE.md", "CONTRIBUTING.md")
SUFFIXES = {".py", ".md", ".yaml", ".yml", ".sh"}

REPLACEMENTS = {
    r"\b(un)?mend(s|ed|ing|able)?\b": "fix, repair",
    r"\b(tells?|told)\b(?!( \w+){0,4} apart\b)": "say, show, report, is given by",
    r"(?<!you )\bwants?\b": "needs, expects, takes",
    r"\b(stands?|stood)\b(?! (for|out)\b)": "is, lies, follows",
    r"\banew\b": "again",
    r"(?<!\bleft )(?<!\bfile )\bbehind\b(?! a (proxy|firewall)\b)": "after, at",
    r"\bof (its|their|his|her) own\b": "its own ..., separate",
    r"\bas (it is|they are)(?=\s*([.,;:)]|$))": "unchanged",
    r"\bwhat it says\b": "its text, its content",
    r"\bnobody\b": "no one; or name what does not happen",
    r"\ball one\b": "the same",
}
"""Words and phrases in the sense that is to be replaced, and what to write instead."""

OPENINGS = re.compile(r"(What|How|Whether|That|Which)\b")
"""A docstring opens with a verb and its object: "Return the capped size of each source"."""

ALLOWED: dict[str, tuple[str, ...]] = {
    # A prompt: answers that are kept belong to its exact words.
    "data_recipes/prompts/describe_clean.yaml": (r"\b(tells?|told)\b(?!( \w+){0,4} apart\b)",),
    # A caption of the toy world: "a small red ring stands still".
    "scripts/toy_world/questions.py": (r"\b(stands?|stood)\b(?! (for|out)\b)",),
}
"""Patterns of ``REPLACEMENTS`` that a file may use in their plain sense."""


@dataclass(frozen=True)
class Prose:
    """A piece of text that a reader sees, with its first line in the file."""

    line: int
    text: str
    docstring: bool = False


def documents() -> list[Path]:
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    files += [ROOT / page for page in PAGES]
    return sorted(path for path in files if path.suffix in SUFFIXES)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def docstrings_of(tree: ast.Module) -> dict[int, ast.Constant]:
    """Return docstrings by first line: of modules, classes, functions and assigned names."""
    docstrings: dict[int, ast.Constant] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and is_text(node.value):
            docstrings[node.value.lineno] = node.value
    return docstrings


def is_text(node: ast.expr | ast.AST) -> TypeGuard[ast.Constant]:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def python_prose(source: str) -> Iterator[Prose]:
    """Yield comments, docstrings and string literals of more than one word."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield Prose(token.start[0], token.string)
    tree = ast.parse(source)
    docstrings = docstrings_of(tree)
    for node in ast.walk(tree):
        if is_text(node) and " " in node.value.strip():
            yield Prose(node.lineno, node.value, docstrings.get(node.lineno) is node)


def page_prose(text: str) -> Iterator[Prose]:
    """Yield the lines of a page outside of its code blocks."""
    in_code = False
    for number, line in enumerate(text.splitlines(), start=1):
        if line.lstrip().startswith("```"):
            in_code = not in_code
        elif not in_code:
            yield Prose(number, line)


def comment_prose(text: str) -> Iterator[Prose]:
    """Yield the lines of YAML and shell files that hold a space."""
    for number, line in enumerate(text.splitlines(), start=1):
        if " " in line.strip():
            yield Prose(number, line)


def prose_of(path: Path) -> Iterator[Prose]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return python_prose(text)
    if path.suffix == ".md":
        return page_prose(text)
    return comment_prose(text)


def without_code(text: str) -> str:
    """Return the text without inline code and line breaks."""
    return " ".join(re.sub(r"``?[^`]+``?", " CODE ", text).split())


def complaints(prose: Prose, allowed: tuple[str, ...] = ()) -> list[str]:
    """Return the words of a text that are to be replaced, with what to write instead."""
    text = without_code(prose.text)
    problems = []
    if prose.docstring and OPENINGS.match(text):
        problems.append(f"{text.split()[0]!r} opens a docstring; begin with a verb")
    for pattern, replacement in REPLACEMENTS.items():
        if pattern in allowed:
            continue
        for match in re.finditer(pattern, text, re.IGNORECASE):
            context = text[max(0, match.start() - 30) : match.end() + 20]
            problems.append(f"{match[0]!r} in {context!r}: write {replacement}")
    return problems


@pytest.mark.parametrize("path", documents(), ids=name_of)
def test_prose_is_plain(path: Path) -> None:
    allowed = ALLOWED.get(name_of(path), ())
    problems = []
    for prose in prose_of(path):
        problems += [f"line {prose.line}: {problem}" for problem in complaints(prose, allowed)]
    assert not problems, "\n".join([name_of(path), *problems])


def test_exceptions_name_what_exists() -> None:
    missing = [entry for entry in ALLOWED if not (ROOT / entry).exists()]
    assert not missing, f"{missing} do not exist; delete them from ALLOWED"
    for patterns in ALLOWED.values():
        assert set(patterns) <= REPLACEMENTS.keys()


@pytest.mark.parametrize(
    "sentence",
    [
        "What you can mend is told in one line",
        "the model wants even numbers",
        "the row that stands first",
        "shards are made anew",
        "the frames behind the cut",
        "a class of its own",
        "the text as it is.",
        "read what it says",
        "nobody reads it",
        "to the mask it is all one",
    ],
)
def test_words_to_replace_are_reported(sentence: str) -> None:
    assert complaints(Prose(1, sentence))


@pytest.mark.parametrize(
    "sentence",
    [
        "a token that stands for media",
        "pairs are told apart by their hash",
        "if you want sound",
        "the process leaves no file behind",
        "as it is written to the file",
        "`tell` of a file",
    ],
)
def test_plain_words_pass(sentence: str) -> None:
    assert complaints(Prose(1, sentence)) == []


def test_prose_of_a_module_is_read_in_full() -> None:
    source = '"""What a module is."""\nx = f"{y} wants more"  # stands here\nKEY = "wants"\n'
    reported: list[str] = []
    for prose in python_prose(source):
        reported += [problem.split("'")[1] for problem in complaints(prose)]
    assert reported == ["stands", "What", "wants"]
