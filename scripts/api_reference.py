"""Write the API reference, made from docstrings by pdoc, as HTML. Every warning is an error.

python scripts/api_reference.py OUTPUT
"""

from __future__ import annotations

import argparse
import re
import warnings
from pathlib import Path

import pdoc

import avllm

PACKAGE = Path(avllm.__file__).parent


def public_modules() -> list[str]:
    """Return the dotted names of all modules without a leading underscore, the package first."""
    files = sorted(PACKAGE.rglob("*.py"))
    names = [file.relative_to(PACKAGE.parent).with_suffix("").parts for file in files]
    private = {"__main__"}
    public = [n for n in names if n[-1] not in private and not re.match("_[a-z]", n[-1])]
    return sorted(".".join(n).removesuffix(".__init__") for n in public)


def build(output: Path) -> int:
    """Write a page for each public module and return the number of pages.

    Raises:
        UserWarning: pdoc cannot import a module, or cannot resolve a name or an annotation.
    """
    for name in avllm.__all__:  # resolved on first use; pdoc looks into the module's dictionary
        setattr(avllm, name, getattr(avllm, name))
    pdoc.render.configure(docformat="google", footer_text=f"avllm {avllm.__version__}")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pdoc.pdoc(*public_modules(), output_directory=output)
    return len(list(output.rglob("*.html")))


def main() -> None:
    """Read the command line and build."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for the pages")
    output = parser.parse_args().output
    print(f"{output / 'avllm.html'}: {build(output)} pages")


if __name__ == "__main__":
    main()
