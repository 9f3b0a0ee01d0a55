"""Write the files of a recipe's run: its manifests and the account of what was left out."""

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
    """The files of one run.

    They take their names when it is over, so that a run that fails replaces no manifest. The first
    of them is locked while the run lasts: two runs at once would write into each other's files.

    Args:
        folder: where the files are written; made when it is not there.
        recipe: name of the recipe.
        stack: closes the files.

    Raises:
        RecipeError: ``not_a_folder``; ``other_recipe`` where the folder holds another's manifests.
    """

    def __init__(self, folder: Path, recipe: str, stack: ExitStack) -> None:
        self.folder = folder
        self.stack = stack
        self.files: dict[str, IO[str]] = {}
        if folder.exists() and not folder.is_dir():
            raise RecipeError(
                f"{folder} is a file; expected a folder, or a path at which one can be made",
                reason="not_a_folder",
            )
        self.last_splits = self._last_splits(folder / "recipe.json", recipe)
        folder.mkdir(parents=True, exist_ok=True)
        for name in LEFT_OUT:
            self.open(name)

    def _last_splits(self, path: Path, recipe: str) -> set[str]:
        """Return the splits that the last run into this folder made."""
        if not path.is_file():
            return set()
        try:
            last_account = json.loads(path.read_text(encoding="utf-8"))
            name = last_account["recipe"]
            splits = set(last_account["rows"])
        except (ValueError, KeyError, TypeError) as error:
            seen = f"{type(error).__name__}: {error}"
            raise RecipeError(
                f"{path} is not what a recipe wrote ({seen}); delete it, or choose another folder",
                reason="no_account",
            ) from error
        if name != recipe:
            raise RecipeError(
                f"{self.folder} holds the manifests of {name}; choose another folder",
                reason="other_recipe",
            )
        return splits

    def open(self, name: str) -> IO[str]:
        """Return the open file of this name."""
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
        """Write recipe.json and give the files their names.

        Splits that the last run made and this one did not are removed.
        """
        for split in self.last_splits - set(account["rows"]):
            (self.folder / f"{split}.jsonl").unlink(missing_ok=True)
        write_whole(
            self.folder / "recipe.json", json.dumps(account, indent=2, ensure_ascii=False) + "\n"
        )
        self._name(reversed(self.files))  # the locked one last

    def finish_empty(self) -> None:
        """Give their names to the files that say why there is no row, and to no other."""
        self._name(reversed(LEFT_OUT))

    def _name(self, names: Iterable[str]) -> None:
        for name in names:
            self.files[name].flush()
            (self.folder / f"{name}.partial").replace(self.folder / name)
