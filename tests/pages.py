"""Cut the pages of the documentation into blocks, and parse command lines without a run."""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest
import typer

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ALL_PAGES = [*sorted(ROOT.glob("*.md")), *PAGES[1:], *sorted((ROOT / "avllm").rglob("README.md"))]
ALL_PAGES += [ROOT / folder / "README.md" for folder in ("data_recipes", "scripts")]
FENCE = re.compile(
    r"^(?P<mark><!-- run -->\n)?```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        line: of its first line in the page.
        run: the page promises that it can be run in the documentation's example folder.
    """

    page: str
    line: int
    kind: str
    text: str
    run: bool

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(path: Path) -> list[Block]:
    """Return the fenced blocks of a page."""
    text = path.read_text(encoding="utf-8")
    return [
        Block(
            path.name,
            text[: m.start("text")].count("\n") + 1,
            m["kind"],
            m["text"],
            m["mark"] is not None,
        )
        for m in FENCE.finditer(text)
    ]


BLOCKS = [block for path in PAGES for block in blocks_of(path)]


def blocks(kind: str, run: bool | None = None) -> list[Block]:
    """Return the blocks of a language, those to be run, those not, or (None) all."""
    return [b for b in BLOCKS if b.kind == kind and run in (None, b.run)]


@dataclass(frozen=True)
class Command:
    """A line of a bash block."""

    block: Block
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.block.page}: {' '.join(self.words[:4])}"


def commands(run: bool | None = None) -> list[Command]:
    """Return the command lines of all bash blocks."""
    found = []
    for block in blocks("bash", run):
        for line in block.text.splitlines():
            words = tuple(shlex.split(line, comments=True))
            if words:
                found.append(Command(block, words))
    return found


def prose_of(path: Path) -> str:
    """Return a page without its fenced blocks."""
    return FENCE.sub("", path.read_text(encoding="utf-8"))


def anchors_of(path: Path) -> set[str]:
    """Return the anchors that a page's headings get (GitHub's rule)."""
    headings = re.findall(r"^#+ +(.+)$", prose_of(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


class _Parsed(BaseException):
    """A command line was accepted; raised in the place of what would run next."""


def parse_script(path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Start a script with arguments and stop it when its command line has been parsed.

    Raises:
        AssertionError: the script refuses the arguments, or reads no command line.
    """
    parse = argparse.ArgumentParser.parse_args

    def parse_only(self: argparse.ArgumentParser, *given: Any, **options: Any) -> NoReturn:
        parse(self, *given, **options)
        raise _Parsed

    def accept(self: Any, context: Any) -> NoReturn:
        raise _Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    monkeypatch.setattr(typer.core.TyperCommand, "invoke", accept)
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path])
    try:
        runpy.run_path(str(path), run_name="__main__")
    except _Parsed:
        return
    except SystemExit as error:
        raise AssertionError(f"{path.name} {arguments} ends with {error.code}") from error
    raise AssertionError(f"{path.name} reads no command line")
