"""Write the API reference, made from docstrings by pdoc, as HTML. Every warning is an error.

python scripts/api_reference.py OUTPUT
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import pdoc

import avllm

HARMLESS = (
    # The constructor of a named tuple does not know the names of its module; its fields are shown.
    r"Error parsing type annotation ForwardRef\('\w+'\) for [\w.]+\.__init__",
    r".*'array.array' is not subscriptable",  # it is from Python 3.12 on
)
PACKAGE = Path(avllm.__file__).parent


def public_modules() -> list[str]:
    """Return the package and its files and folders; pdoc finds what is in the folders."""
    names = {file.stem for file in PACKAGE.glob("*.py") if not file.stem.startswith("_")}
    names |= {folder.parent.name for folder in PACKAGE.glob("*/__init__.py")}
    return ["avllm", *sorted(f"avllm.{name}" for name in names)]


def build(output: Path) -> int:
    """Write a page for each public module and return the number of pages.

    Raises:
        UserWarning: pdoc cannot import a module, or cannot resolve a name or an annotation.
    """
    for name in avllm.__all__:  # resolved on first use; pdoc looks into the module's dictionary
        setattr(avllm, name, getattr(avllm, name))
    pdoc.render.configure(
        docformat="google", show_source=False, footer_text=f"avllm {avllm.__version__}"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for message in HARMLESS:
            warnings.filterwarnings("ignore", message)
        pdoc.pdoc(*public_modules(), output_directory=output)
    return len(list(output.rglob("*.html")))


def main() -> None:
    """Read the command line and build."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="folder for the pages")
    output = parser.parse_args().output
    print(f"{output / 'avllm.html'}: {build(output)} pages")


if __name__ == "__main__":
    main()
