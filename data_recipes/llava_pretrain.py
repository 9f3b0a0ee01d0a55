r"""Turn LLaVA-Pretrain (558K pictures of LAION, CC and SBU) and CC3M-595K into captions.

    python data_recipes/llava_pretrain.py SOURCE --output DIR

Both are one JSON list of `{"id", "image", "conversations": [{"from": "human", "value":
"<image>\n..."}, {"from": "gpt", "value": caption}]}` with `<image>` before or after the question;
pictures are in images.zip, `00453/004539375.jpg` or `GCC_train_000000000.jpg`
(https://huggingface.co/datasets/liuhaotian/LLaVA-Pretrain and .../LLaVA-CC3M-Pretrain-595K). The
authors' questions are kept; `--own-prompts` takes those of all other caption sets.
Paper: H. Liu et al., Visual Instruction Tuning, NeurIPS 2023, arXiv:2304.08485.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from avllm.recipes import frame as recipe
from avllm.recipes.conversations import chat_messages
from avllm.recipes.frame import (
    Dataset,
    Drop,
    RecipeRow,
    Record,
    caption_messages,
    first_file,
    read_json,
    rows_of,
)

ABOUT = Dataset(
    title="LLaVA-Pretrain, CC3M-595K",
    licence="of CC-3M, and for 558K also of LAION and SBU (BLIP captions: BSD-3-Clause)",
    size="558K or 595K pictures, 27 GB or 6 GB",
    where="https://huggingface.co/datasets/liuhaotian/LLaVA-Pretrain (or "
    "LLaVA-CC3M-Pretrain-595K); unpack images.zip",
    layout="""
        blip_laion_cc_sbu_558k.json | chat.json  the conversations
        [images/  images.zip, unpacked; or its content beside the json]
    """,
    citation="Liu et al., Visual Instruction Tuning, NeurIPS 2023, arXiv:2304.08485",
)


def rows(
    source: Path,
    own_prompts: Annotated[
        bool, typer.Option("--own-prompts", help="Ask as in the other caption sets.")
    ] = False,
) -> Iterator[RecipeRow | Drop]:
    """Yield one row a picture."""
    records = read_json(source / first_file(source, ("blip_laion_cc_sbu_558k.json", "chat.json")))
    yield from rows_of(records, partial(picture_row, source=source, own_prompts=own_prompts))


def picture_row(record: Record, source: Path, own_prompts: bool) -> RecipeRow | Drop:
    """Return the row of one picture, or why it is left out."""
    image = record.text("image")
    part = {"type": "image", "image": first_file(source, (f"images/{image}", image))}
    messages = chat_messages(record["conversations"], {"image": [part]})
    if len(messages) != 2:
        return Drop(
            "not_one_caption",
            record.where,
            f"{len(messages)} turns; expected a question and its caption",
        )
    name = f"llava-pretrain-{record.text('id')}"
    if own_prompts:
        messages = caption_messages(part, messages[1]["content"][0]["text"], name)
    return RecipeRow({"id": name, "messages": messages})


if __name__ == "__main__":
    recipe.main(ABOUT, rows)
