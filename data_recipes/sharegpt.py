r"""Turn LLaVA-Instruct-150K, and any conversations in ShareGPT's form into manifests.

    python data_recipes/sharegpt.py SOURCE --output DIR [--file NAME.json] [--media FOLDER]

The form: a JSON list (or JSON lines) of `{"id", "image", "conversations": [{"from": "human",
"value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]}`. `image`, `video` and
`audio` hold one file name or a list; the k-th `<image>`, `<video>`, `<audio>` stands for the k-th
file of its kind. LLaMA-Factory's variant (`messages` with `role` and `content`; `images`, `videos`,
`audios`) is read, too.

LLaVA-Instruct-150K (https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K):
llava_instruct_150k.json is the whole; llava_instruct_80k, conversation_58k, detail_23k and
complex_reasoning_77k are parts of it. Pictures are COCO train2017's, named `000000033471.jpg`; the
same picture, and so the same id, occurs in several rows. LLaVA-1.5's mixture
(llava_v1_5_mix665k.json) names them `coco/train2017/000000033471.jpg`, holds text-only rows of
ShareGPT, and there conversations that begin with an answer: LLaVA's own loader skips that answer,
here it takes --from-first-question.

Known defects, dropped with their reasons: more or fewer placeholders than files (as in M4-Instruct,
https://github.com/LLaVA-VL/LLaVA-NeXT/issues/107), placeholders in answers and roles the wrong way
round (issue 89 there), turns that do not alternate, `<image>` in the text of rows without pictures.
Paper: H. Liu et al., Visual Instruction Tuning, NeurIPS 2023, arXiv:2304.08485.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from avllm.log import logger
from avllm.recipes import frame as recipe
from avllm.recipes.conversations import chat_messages, without_leading_answers
from avllm.recipes.frame import (
    Dataset,
    Drop,
    RecipeError,
    RecipeRow,
    Record,
    first_file,
    read_json,
    read_jsonl,
    rows_of,
)
from avllm.recipes.media import SOUND_FILES, VIDEO_FILES

ABOUT = Dataset(
    title="LLaVA-Instruct-150K, and any ShareGPT conversations",
    licence="CC BY 4.0 (earlier: CC BY-NC 4.0) and OpenAI's terms of use (LLaVA-Instruct-150K); "
    "pictures: COCO's. Another set has its own",
    size="158K conversations about 81K pictures; COCO train2017: 19 GB",
    where="https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K; pictures from "
    "https://cocodataset.org",
    layout="""
        llava_instruct_150k.json | *.json | *.jsonl  the conversations; --file chooses
        [train2017/  the pictures, or another folder given by --media]
    """,
    citation="Liu et al., Visual Instruction Tuning, NeurIPS 2023, arXiv:2304.08485",
)
LOG = logger(__name__)
WHOLE = "llava_instruct_150k.json"
PARTS = (
    "llava_instruct_80k.json",
    "conversation_58k.json",
    "detail_23k.json",
    "complex_reasoning_77k.json",
)
LLAVAS = {WHOLE, *PARTS}
LICENCE = "CC BY 4.0 and OpenAI's terms of use; pictures: COCO's"
KINDS = ("image", "video", "audio")
FOLDERS = {
    "image": ("", "images/", "train2017/", "coco/train2017/"),
    "video": ("", "videos/"),
    "audio": ("", "audios/"),
}
ENDINGS = {
    "image": (".jpg", ".png", ".jpeg", ".gif", ".webp"),
    "video": VIDEO_FILES,
    "audio": SOUND_FILES,
}


def rows(
    source: Path,
    file: Annotated[
        str, typer.Option(help="The conversations; by default LLaVA's, or the only JSON file.")
    ] = "",
    media: Annotated[
        str, typer.Option(help="Folder that file names start from, in SOURCE or anywhere.")
    ] = "",
    set_name: Annotated[
        str,
        typer.Option(
            "--name", help="`source`, and beginning of each id; by default the file's name."
        ),
    ] = "",
    licence: Annotated[
        str,
        typer.Option(
            help="Licence of the set, for each row; by default LLaVA-Instruct-150K's has one."
        ),
    ] = "",
    from_first_question: Annotated[
        bool,
        typer.Option(
            "--from-first-question", help="Leave out answers in front of the first question."
        ),
    ] = False,
) -> Iterator[RecipeRow | Drop]:
    """Yield one row a conversation."""
    path = source / (file or the_file(source))
    name = set_name or path.name.split(".")[0]
    terms = licence or (LICENCE if path.name in LLAVAS else None)
    if terms is None:
        LOG.warning(
            "no licence is known of %s: its rows get none; name it with --licence", path.name
        )
    records = read_jsonl(path) if path.suffix == ".jsonl" else read_json(path)
    yield from rows_of(
        records,
        partial(
            build,
            own={"source": name, "licence": terms},
            source=source,
            folder=media,
            skip=from_first_question,
        ),
    )


def the_file(source: Path) -> str:
    """LLaVA's conversations, or the only file there is.

    Raises:
        RecipeError: there are several.
    """
    names = sorted(p.name for p in source.iterdir() if p.suffix in (".json", ".jsonl"))
    if WHOLE in names:
        return WHOLE
    if len(names) != 1:
        raise RecipeError(
            f"{source} holds {', '.join(names)}; choose one with --file", reason="no_single_file"
        )
    return names[0]


def build(record: Record, own: dict[str, Any], source: Path, folder: str, skip: bool) -> RecipeRow:
    """Return the row of one conversation; ``own`` is source and licence of the set."""
    field = "conversations" if "conversations" in record else "messages"
    turns = record[field]
    asked = without_leading_answers(turns) if skip else turns
    parts = {}
    for kind in KINDS:
        names = file_names(record, kind)
        parts[kind] = [part(source, folder, kind, name) for name in names]
    name = record.text("id") if "id" in record else record.where
    sample: dict[str, Any] = {
        "id": f"{own['source']}-{name}",
        "messages": chat_messages(asked, parts),
    } | own
    if len(asked) < len(turns):
        sample["meta"] = {"turns_left_out": len(turns) - len(asked)}
    return RecipeRow(sample)


def file_names(record: Record, kind: str) -> list[str]:
    """Return the files of a kind: one name, or a list, under the kind's name or its plural."""
    value = record.get(kind, record.get(f"{kind}s"))
    names = value if isinstance(value, list) else [value]
    if any(not isinstance(name, str) for name in names if name):
        raise RecipeError(
            f"{record.where}: field {kind!r} is {str(value)[:80]}; expected file names"
        )
    return [name for name in names if name]


def part(source: Path, folder: str, kind: str, name: str) -> dict[str, Any]:
    """Return the content part of a file.

    A name without suffix is tried with the suffixes of its kind.
    """
    endings = ("",) if Path(name).suffix else ENDINGS[kind]
    folders = (f"{folder}/",) if folder else FOLDERS[kind]
    return {
        "type": kind,
        kind: first_file(source, (f"{f}{name}{e}" for f in folders for e in endings)),
    }


if __name__ == "__main__":
    recipe.main(ABOUT, rows)
