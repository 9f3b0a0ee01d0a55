"""Write the table of all recipes in ``data_recipes/README.md`` from their ABOUTs.

    python -m avllm.recipes.table data_recipes

Recipes are read, not imported: an ABOUT is a call with nothing but text in it.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

from avllm.recipes.about import Dataset
from avllm.recipes.readers import RecipeError

BEGIN = "<!-- table of recipes -->\n"
END = "<!-- end of table -->\n"
HEAD = (
    "| recipe | dataset | licence | size | where to get it | command |\n|---|---|---|---|---|---|\n"
)


def read_about(path: Path) -> Dataset | None:
    """Return the ABOUT of a recipe, None when it has none.

    Raises:
        RecipeError: ``about_not_text``.
    """
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        call = _call_of_about(statement)
        if call is None:
            continue
        try:
            return Dataset(**{str(k.arg): ast.literal_eval(k.value) for k in call.keywords})
        except (ValueError, TypeError) as error:
            raise RecipeError(
                f"{path}: ABOUT has to be Dataset(field=text, ...): {error}",
                reason="about_not_text",
            ) from error
    return None


def _call_of_about(statement: ast.stmt) -> ast.Call | None:
    """Return the call of ``ABOUT = Dataset(...)``, None for any other statement."""
    if not isinstance(statement, ast.Assign) or not isinstance(statement.value, ast.Call):
        return None
    names = [target.id for target in statement.targets if isinstance(target, ast.Name)]
    return statement.value if names == ["ABOUT"] else None


def table(folder: Path) -> str:
    """Return the table: one row a recipe that has an ABOUT, by file name."""
    lines = []
    for path in sorted(folder.glob("*.py")):
        about = read_about(path)
        if about is None:
            continue
        command = about.command or f"python data_recipes/{path.name} SOURCE --output DIR"
        cells = (
            f"`{path.name}`",
            about.title,
            about.licence,
            about.size,
            about.where,
            f"`{command}`",
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
    return HEAD + "".join(lines)


def page(text: str, folder: Path) -> str:
    """Return a page with its table replaced.

    Raises:
        RecipeError: ``no_place`` for the table in the page.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise RecipeError(
            f"the page has no lines {BEGIN.strip()!r} and {END.strip()!r} around its table",
            reason="no_place",
        )
    return before + begin + table(folder) + end + after


def main(folder: Path) -> None:
    """Write the table into the folder's README.md."""
    readme = folder / "README.md"
    readme.write_text(page(readme.read_text(encoding="utf-8"), folder), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
