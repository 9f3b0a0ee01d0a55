"""Write media files that are broken or odd, a manifest of them, and what each of them is.

    python scripts/broken_media/make.py OUT --count 200 --seed 0

OUT gets the files, `manifest.jsonl` (a row about each) and `expected.jsonl`, one object a row:
`id`, `class`, `errors` (what a check may call it; [] where it is odd and still good), `either`
(chance decides whether the damage matters: good is right as well) and `warnings` (which it must
say). The classes take turns; the same seed gives the same files.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import av
import broken  # noqa: F401 (it enters its classes)
import numpy as np
import odd  # noqa: F401 (likewise)
from classes import CLASSES, Place


def make(out: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """Write `count` files with their manifest, and return what a check has to report of each."""
    out.mkdir(parents=True, exist_ok=False)
    names = list(CLASSES)
    rows = []
    expected = []
    for number in range(count):
        name = names[number % len(names)]
        kind = CLASSES[name]
        turn = number // len(names)
        identity = f"{name}-{turn}"
        part = kind.make(Place(out, identity, turn, np.random.default_rng([seed, number])))
        question = [part, {"type": "text", "text": "what colour is it ?"}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "red"}]
        rows.append(
            {"id": identity, "source": "broken", "licence": "CC0-1.0", "messages": messages}
        )
        reports = {
            "errors": list(kind.errors),
            "either": kind.either,
            "warnings": list(kind.warnings),
        }
        expected.append({"id": identity, "class": name, **reports})
    for file, lines in (("manifest.jsonl", rows), ("expected.jsonl", expected)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (out / file).write_text(text, encoding="utf-8")
    return expected


def main() -> None:
    """Write the files that the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder, made new")
    parser.add_argument("--count", type=int, default=200, help="files")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    given = parser.parse_args()
    if given.out.exists():
        parser.error(f"{given.out} is there already; name a folder that is not, or delete it")
    if given.count < 1:
        parser.error(f"--count {given.count}; expected at least 1")
    av.logging.set_level(av.logging.FATAL)
    expected = make(given.out, given.count, given.seed)
    certain = sum(bool(e["errors"]) and not e["either"] for e in expected)
    files = f"{len(expected)} files of {len(CLASSES)} classes"
    print(f"{given.out}: {files}, {certain} broken for certain")


if __name__ == "__main__":
    main()
