"""Tiny models whose Q-Former reads text, batches for them, and the three objectives on it."""

from __future__ import annotations

from typing import Any

import torch
from tiny import World

from avllm.config_model import ModelConfig
from avllm.data.collate import Batch
from avllm.data.dataset import SampleDataset
from avllm.models.building.placeholders import load_tokenizer
from avllm.models.modeling_avllm import AVLLM
from avllm.models.processing_avllm import AVProcessor
from avllm.objectives._qformer import QFormerTerm
from avllm.registry import build
from avllm.training.start import Parts, padding

TERMS = ("qformer_contrastive", "qformer_matching", "qformer_captioning")
QFORMER: dict[str, Any] = {
    "type": "qformer",
    "stream": "video",
    "num_queries": 3,
    "dim": 32,
    "layers": 2,
    "heads": 2,
}
OWN = 40  # tokens of the tiny tokenizer, and some


def connector(world: World, **changes: Any) -> list[dict[str, Any]]:
    """The tiny world's connector behind a Q-Former for video."""
    return [QFORMER | {"cross_every": 1, "text": "llm"} | changes, *world.model["connector"]]


def make_parts(
    world: World,
    std: float | None = 0.3,
    adapters: list[dict[str, Any]] | None = None,
    **changes: Any,
) -> Parts:
    """A model with a Q-Former that reads text; weights of 0.02 would hide what is read."""
    torch.manual_seed(0)
    description = ModelConfig.model_validate(
        world.model | {"connector": adapters or connector(world, **changes)}
    )
    tokenizer, ids = load_tokenizer(description)
    model = AVLLM.from_backbones(description, ids)
    with torch.no_grad():
        for name, p in model.connector[0].named_parameters():
            if std and p.dim() > 1 and "norm" not in name.lower():
                p.normal_(std=std)
    return Parts(model, AVProcessor.from_model(model, tokenizer), [])


def batch_of(parts: Parts, world: World, places: list[int], blanks: bool = False) -> Batch:
    """Some captions of the tiny world; none gives the batch of a process that has only bad rows."""
    dataset = SampleDataset([str(world.captions)], parts.processor)
    return padding(parts, blanks=blanks)([dataset[i] for i in places])[0].batch


def term(world: World, parts: Parts, name: str, **options: Any) -> QFormerTerm:
    """An objective, with the tokenizer that a vocabulary of its own needs."""
    if parts.model.connector[0].text.vocabulary is not None:
        options["tokenizer"] = str(world.llm)
    return build("objectives", {"type": name, **options}, parts.model)
