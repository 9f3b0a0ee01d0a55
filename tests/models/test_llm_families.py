"""LLM architectures: each trains, answers, is saved and loaded; or is refused, with the reason."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from llm_families import FAMILIES, make_family
from tiny import World, make_world, settings

from avllm.config import RunConfig
from avllm.data.manifest import read_manifest
from avllm.data.reading import MediaReader
from avllm.inference.generation import Generation, answer_rows
from avllm.models.llm_trial import LLMError
from avllm.models.modeling_avllm import AVLLM
from avllm.models.processing_avllm import AVProcessor
from avllm.training.trainer import run_stage

torch.set_num_threads(1)
SHORT = [
    "bloom",
    "falcon_mamba",
    "gemma2",
    "falcon_h1",
    "gpt2",
    "gpt_bigcode",
    "mistral",
    "mixtral",
    "qwen2",
]
NAMES = list(FAMILIES) if os.environ.get("AVLLM_SLOW") else SHORT


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), clips=3)


def stage(world: World, llm: Path, output: Path) -> dict[str, Any]:
    """Return the settings of three steps with the smallest connector."""
    model = {
        "llm": {"name": str(llm)},
        "encoders": {"video": world.model["encoders"]["video"]},
        "connector": [{"type": "linear", "stream": "video"}],
        "sampling": {"num_frames": 1},
    }
    return settings(world, output, model=model, train__max_steps=3)


@pytest.mark.parametrize("name", NAMES)
def test_an_architecture_works_or_is_refused(world: World, tmp_path: Path, name: str) -> None:
    family = FAMILIES[name]
    run = RunConfig.model_validate(
        stage(world, make_family(name, tmp_path / "llm"), tmp_path / "run")
    )
    if family.refused is not None:
        with pytest.raises(LLMError) as caught:
            run_stage(run)
        assert caught.value.reason == family.refused
        return
    run_stage(run)
    model = AVLLM.from_pretrained(str(tmp_path / "run"))
    processor = AVProcessor.from_pretrained(tmp_path / "run")
    rows = []
    for sample in read_manifest(world.questions)[:3]:
        media = MediaReader(processor).inputs(sample.media, world.questions.parent)
        rows.append(processor.row(sample, media, answer=False))
    generation = Generation(max_new_tokens=4)
    alone = [answer_rows(model, processor, [row], generation)[0] for row in rows]
    assert answer_rows(model, processor, rows, generation) == alone
