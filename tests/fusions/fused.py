"""Tiny models with a fusion, their gates open, and rows for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tiny import World

from avllm.config_model import ModelConfig
from avllm.data.reading import MediaReader
from avllm.data.row import Row
from avllm.data.schema import Sample
from avllm.models.building.placeholders import load_tokenizer
from avllm.models.modeling_avllm import AVLLM
from avllm.models.processing_avllm import AVProcessor
from avllm.registry import choices

SMALL: dict[str, dict[str, Any]] = {
    "gated_cross_attention": {"every": 1, "heads": 2, "dim_head": 8, "ff_mult": 2},
}
"""Small options of each fusion; a new one is tested with its defaults, or with a line here."""


def cases() -> list[dict[str, Any]]:
    """Every fusion of the registry, with the sound as its stream."""
    return [
        {"type": name, "streams": ["audio"], **SMALL.get(name, {})} for name in choices("fusions")
    ]


def compose(world: World, fusion: dict[str, Any], **changes: Any) -> tuple[AVLLM, AVProcessor]:
    """Build a model with a fusion in which every parameter of the fusion is drawn, gates too."""
    torch.manual_seed(0)
    description = ModelConfig.model_validate(world.model | {"fusion": fusion} | changes)
    tokenizer, ids = load_tokenizer(description)
    model = AVLLM.from_backbones(description, ids)
    open_gates(model)
    return model.eval(), AVProcessor.from_model(model, tokenizer)


def open_gates(model: AVLLM) -> None:
    """Draw every parameter of the fusion, so that what it adds is not zero."""
    assert model.fusion is not None
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.fusion.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def sample(id: str, *content: str | Path, answer: str | None = "red and a low sound") -> Sample:
    """A row of one turn: files are videos, other text is text."""
    parts = [
        {"type": "video", "video": str(c)} if isinstance(c, Path) else {"type": "text", "text": c}
        for c in content
    ]
    messages: list[dict[str, Any]] = [{"role": "user", "content": parts}]
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return Sample.model_validate({"id": id, "messages": messages})


def make_rows(processor: AVProcessor, samples: Sequence[Sample], answer: bool) -> list[Row]:
    """Rows of samples, their files read."""
    return [
        processor.row(s, MediaReader(processor).inputs(s.media, None), answer=answer)
        for s in samples
    ]


def questions(clips: Sequence[Path]) -> list[Sample]:
    """Rows with no, one and three clips, before, between and after text, one clip silent."""
    first, second, third, silent = clips
    return [
        sample("text", "what colour is it ?"),
        sample("one", first, "what colour is it ?"),
        sample("three", "describe", first, "and", second, third, "do you hear a low sound ?"),
        sample("after", "do you hear a high sound or nothing ?", second),
        sample("silent", silent, "what colour is it ?"),
    ]
