"""The table of all recipes in ``data_recipes/README.md``, made from their ABOUTs.

    python -m avllm.recipes.table data_recipes

writes it anew. Recipes are read, not imported: an ABOUT is a call with nothing but text in it.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

from avllm.recipes.about import Dataset
from avllm.recipes.readers import RecipeError

BEGIN, END = "<!-- table of recipes -->\n", "<!-- end of table -->\n"
HEAD = "| recipe | dataset | licence | size | where to get it | command |\n|---|---|---|---|---|---|\n"


def read_about(path: Path) -> Dataset | None:
    """The ABOUT of a recipe, None when it has none.

    Raises:
        RecipeError: ABOUT is more than text.
    """
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        names = [t.id for t in node.targets if isinstance(t, ast.Name)] if isinstance(node, ast.Assign) else []
        if names != ["ABOUT"] or not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Call):
            continue
        try:
            return Dataset(**{str(k.arg): ast.literal_eval(k.value) for k in node.value.keywords})
        except (ValueError, TypeError) as error:
            raise RecipeError(f"{path}: ABOUT has to be Dataset(field=text, ...): {error}") from error
    return None


def table(folder: Path) -> str:
    """One row a recipe that has an ABOUT, by file name."""
    rows = []
    for path in sorted(folder.glob("*.py")):
        about = read_about(path)
        if about is not None:
            command = about.command or f"python data_recipes/{path.name} SOURCE --output DIR"
            cells = (f"`{path.name}`", about.title, about.licence, about.size, about.where, f"`{command}`")
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
    return HEAD + "".join(rows)


def page(text: str, folder: Path) -> str:
    """A page with its table made anew.

    Raises:
        RecipeError: the page has no place for it.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise RecipeError(f"the page has no lines {BEGIN.strip()!r} and {END.strip()!r} around its table")
    return before + begin + table(folder) + end + after


def main(folder: Path) -> None:
    """Write the table into the folder's README.md."""
    readme = folder / "README.md"
    readme.write_text(page(readme.read_text(encoding="utf-8"), folder), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
