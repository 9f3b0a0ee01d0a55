"""The files that a recipe's run writes: its manifests and the account of what was left out."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from avllm.data.store.append_only import lock, write_whole
from avllm.recipes.readers import RecipeError

LEFT_OUT = ("dropped.jsonl", "missing.txt")


class Output:
    """The files of one run; they take their names when it is over, so that a run that fails replaces no manifest.

    The first of them is locked while the run lasts: two runs at once would write into each other's files.

    Raises:
        RecipeError: the folder is a file, or holds the manifests of another recipe.
    """

    def __init__(self, folder: Path, recipe: str, stack: ExitStack) -> None:
        self.folder, self.stack = folder, stack
        self.files: dict[str, IO[str]] = {}
        if folder.exists() and not folder.is_dir():
            raise RecipeError(f"{folder} is a file; expected a folder, or a path at which one can be made")
        self.splits = self._splits(folder / "recipe.json", recipe)
        folder.mkdir(parents=True, exist_ok=True)
        for name in LEFT_OUT:
            self.open(name)

    def _splits(self, path: Path, recipe: str) -> set[str]:
        """The splits that the last run here made."""
        if not path.is_file():
            return set()
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            name, splits = before["recipe"], set(before["rows"])
        except (ValueError, KeyError, TypeError) as error:
            seen = f"{type(error).__name__}: {error}"
            raise RecipeError(
                f"{path} is not what a recipe wrote ({seen}); delete it, or choose another folder"
            ) from error
        if name != recipe:
            raise RecipeError(f"{self.folder} holds the manifests of {name}; choose another folder")
        return splits

    def open(self, name: str) -> IO[str]:
        """The open file of this name."""
        if name not in self.files:
            path = self.folder / f"{name}.partial"
            file = self.stack.enter_context(path.open("a", encoding="utf-8", newline="\n"))
            if not self.files:
                lock(file, path)
            file.truncate(0)
            self.files[name] = file
        return self.files[name]

    def line(self, name: str, value: dict[str, Any]) -> None:
        """Append a JSON object."""
        self.open(name).write(json.dumps(value, ensure_ascii=False) + "\n")

    def finish(self, account: dict[str, Any]) -> None:
        """Name the files, remove splits that the last run here made and this one did not, write recipe.json."""
        for split in self.splits - set(account["rows"]):
            (self.folder / f"{split}.jsonl").unlink(missing_ok=True)
        write_whole(self.folder / "recipe.json", json.dumps(account, indent=2, ensure_ascii=False) + "\n")
        self._name(reversed(self.files))  # the locked one last

    def finish_empty(self) -> None:
        """Name what tells why there is no row, and nothing else."""
        self._name(reversed(LEFT_OUT))

    def _name(self, names: Iterable[str]) -> None:
        for name in names:
            self.files[name].flush()
            (self.folder / f"{name}.partial").replace(self.folder / name)
