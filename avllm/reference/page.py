"""Write the page of all settings and of all fields of a row, ``docs/settings.md``.

    python -m avllm.reference.page docs/settings.md

The text comes from the descriptions beside the fields in the code; a test compares the page.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from avllm.reference.settings import Setting, preset_settings, row_fields

HEAD = """# Settings

Every key of a preset, and every field of a manifest's row. The page is made from the descriptions
in the code by `python -m avllm.reference.page docs/settings.md`. The command line knows the same,
and shows where in a preset a key lies; options of parts are listed by `avllm parts`:

<!-- run -->
```bash
avllm config
avllm config data
avllm config train.max_steps
avllm config row.messages.content.video
avllm parts encoders mel_conv
```

On a command line, a key is followed by its value, `train.max_steps=100`; an item of a list has its
number as a key, `model.connector.0.depth=3`. Relative paths, in a preset as well, are relative to
the folder in which a command runs. Media in a manifest are relative to the manifest's folder.

"""


def page() -> str:
    """Return the text of the page."""
    lines = [HEAD, "## A preset\n\n", *_table(preset_settings())]
    for setting in preset_settings():
        if setting.inner:
            lines += [f"\n## {setting.key}\n\n", f"{_sentence(setting.about)}\n\n"]
            lines += _table(tuple(_below(setting)))
    lines.append("\n## A row of a manifest\n\n")
    lines += _table(tuple(field for root in row_fields() for field in root.walk()))
    return "".join(lines)


def _below(setting: Setting) -> Iterator[Setting]:
    """Yield all settings within a section."""
    for inner in setting.inner:
        yield from inner.walk()


def _sentence(about: str) -> str:
    return f"{about[:1].upper()}{about[1:]}."


def _table(settings: tuple[Setting, ...]) -> Iterator[str]:
    yield "| key | type | default | meaning |\n|---|---|---|---|\n"
    for setting in settings:
        default = "required" if setting.default == "required" else f"`{setting.default}`"
        kind = setting.type
        if setting.allowed and not setting.kind:
            kind += f", {setting.allowed}"
        cells = (f"`{setting.key.removeprefix('row.')}`", kind, default, setting.about)
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def main(path: Path) -> None:
    """Write the page."""
    path.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
