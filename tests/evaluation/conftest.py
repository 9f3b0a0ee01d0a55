"""A tiny checkpoint whose answers depend on what is seen and heard, and a tiny manifest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from answering import make_checkpoint
from tiny import make_data

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("evaluated"))


@pytest.fixture(scope="session")
def loaded(checkpoint: Path) -> tuple[Any, Any]:
    from avllm.models.modeling_avllm import AVLLM
    from avllm.models.processing_avllm import AVProcessor

    return AVLLM.from_pretrained(str(checkpoint)), AVProcessor.from_pretrained(checkpoint)


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve clips (each third silent), two questions each, one with choices; and a text row."""
    folder = tmp_path_factory.mktemp("questions")
    _, manifest = make_data(folder, 12)
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    for row in rows:
        if row["kind"] == "seen.colour":
            row["choices"] = ["red", "green", "blue", "white"]
    words = (
        {"role": "user", "content": "what colour is it ?"},
        {"role": "assistant", "content": "red"},
    )
    rows.append({"id": "text-only", "kind": "blind", "messages": list(words)})
    manifest.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return manifest
