"""Read the Q-Former out of a BLIP-2 or InstructBLIP checkpoint of transformers, and no more.

A BLIP-2 model has 3.7 billion weights, its Q-Former 0.1: only the tensors that are needed are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from avllm.weights import check_finite

WITH_TEXT = "Blip2ForImageTextRetrieval"
INSTRUCTED = ("InstructBlipForConditionalGeneration", "InstructBlipModel")
ARCHITECTURES = (WITH_TEXT, "Blip2ForConditionalGeneration", "Blip2Model", *INSTRUCTED)
MODEL_TYPES = ("blip-2", "instructblip")
QFORMER = "qformer."
QUERIES = "query_tokens"
TEXT = {
    "vision_projection.": "query_projection.",
    "text_projection.": "text_projection.",
    "itm_head.": "match.",
    "embeddings.position_embeddings.": "positions.",
    "embeddings.word_embeddings.": "words.",
}
"""Beginnings of BLIP-2's names, and of those in our text side."""

NORM = "qformer.embeddings.layernorm."
INSTRUCTION = {
    "qformer.embeddings.word_embeddings.": "words.",
    "qformer.embeddings.position_embeddings.": "positions.",
}
"""Beginnings of InstructBLIP's names, and of those in our instruction."""


@dataclass(frozen=True)
class Blip2Weights:
    """Hold the weights of a BLIP-2 checkpoint's Q-Former.

    Attributes:
        heads: of its attention; the tensors alone do not show the number.
        query_tokens: ``(1, Q, D)``.
        qformer: its layers, by their names in transformers' Q-Former.
        text: its text side, by our names; empty for a checkpoint without one.
        instruction: the embeddings of instructions, by our names; of InstructBLIP alone.
    """

    heads: int
    query_tokens: Tensor
    qformer: dict[str, Tensor]
    text: dict[str, Tensor] = field(default_factory=dict)
    instruction: dict[str, Tensor] = field(default_factory=dict)


def load_blip2(name: str, with_text: bool) -> Blip2Weights:
    """Read the Q-Former of a BLIP-2 or InstructBLIP checkpoint by hub name or folder.

    Args:
        name: of the checkpoint.
        with_text: its Q-Former has to have layers that read texts.

    Raises:
        ValueError: it is another model, holds no Q-Former, has no text side where one is needed, or
            weights that are not finite.
    """
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    kinds = list(config.architectures or [])
    if config.model_type not in MODEL_TYPES or not set(kinds) & set(ARCHITECTURES):
        raise ValueError(
            f"qformer init {name!r} is a {', '.join(kinds) or config.model_type}; expected one of "
            f"{', '.join(ARCHITECTURES)}, which have a Q-Former"
        )
    if with_text and not set(kinds) & {WITH_TEXT, *INSTRUCTED}:
        raise ValueError(
            f"qformer init {name!r} is a {', '.join(kinds)}, which has no text side; expected a "
            f"{WITH_TEXT} (Salesforce/blip2-itm-vit-g), InstructBLIP, or no text option"
        )
    qformer: dict[str, Tensor] = {}
    text: dict[str, Tensor] = {}
    instruction: dict[str, Tensor] = {}
    queries: Tensor | None = None
    for key, tensor in _tensors(name, (QFORMER, QUERIES, *TEXT)):
        if key == QUERIES:
            queries = tensor
        elif key.startswith(tuple(INSTRUCTION)):
            instruction[_renamed(key, INSTRUCTION)] = tensor
        elif key.startswith(QFORMER):
            name_here = key.replace(NORM, QFORMER + "layernorm.")
            qformer[name_here.removeprefix(QFORMER)] = tensor
        else:
            text[_renamed(key, TEXT)] = tensor
    if queries is None or not qformer:
        raise ValueError(
            f"qformer init {name!r} holds {len(qformer)} tensors of a Q-Former and "
            f"{'no ' if queries is None else ''}query tokens; expected both. Copy it again"
        )
    tensors = [(QUERIES, queries), *qformer.items(), *text.items(), *instruction.items()]
    check_finite(tensors, name)
    heads = config.qformer_config.num_attention_heads
    return Blip2Weights(heads, queries, qformer, text, instruction)


def _renamed(key: str, names: dict[str, str]) -> str:
    """Replace the beginning of a name by ours."""
    for theirs, own in names.items():
        if key.startswith(theirs):
            return own + key.removeprefix(theirs)
    return key


def _tensors(name: str, beginnings: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors whose names begin so; files without one are neither fetched nor opened."""
    for path in _files(name, beginnings):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                if key.startswith(beginnings):
                    yield key, file.get_tensor(key)


def _files(name: str, beginnings: tuple[str, ...]) -> list[str]:
    """Return the safetensors files of a checkpoint that hold the tensors.

    Raises:
        ValueError: it has none, or its index names a file outside of it.
    """
    index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    files = [SAFE_WEIGHTS_NAME]
    if index is not None:
        places = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        files = sorted({file for key, file in places.items() if key.startswith(beginnings)})
    outside = [file for file in files if Path(file).name != file]
    if outside:
        raise ValueError(f"{index} names {outside[0]!r}; expected files beside it")
    paths = [cached_file(name, f, _raise_exceptions_for_missing_entries=False) for f in files]
    present = [path for path in paths if path is not None]
    if len(present) < len(paths) or not paths:
        raise ValueError(
            f"qformer init {name!r} has no {' or '.join(files or [SAFE_WEIGHTS_NAME])}; expected "
            "weights as safetensors. Convert it: model.save_pretrained(folder)"
        )
    return present
