"""A tiny checkpoint that answers, and real media where there are some."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny import World, make_llm, make_siglip, make_whisper

SHARED = Path(__file__).resolve().parents[1] / "../shared/data/media"
REAL_MEDIA = (
    sorted(p for p in SHARED.glob("*") if p.suffix in (".mp4", ".wav", ".jpg"))
    if SHARED.is_dir()
    else []
)
WHY_NOT = f"no real media in {SHARED.name} beside the repository"
KIND = {".mp4": "video", ".wav": "audio", ".jpg": "image"}


def make_checkpoint(folder: Path, streams: Sequence[str] = ("video", "audio")) -> Path:
    """Save random backbones with a connector: answers depend on what is seen and heard."""
    from avllm.config_model import ModelConfig
    from avllm.log import hush_libraries
    from avllm.models.building.placeholders import load_tokenizer
    from avllm.models.checkpoint import save_checkpoint
    from avllm.models.modeling_avllm import AVLLM
    from avllm.models.processing_avllm import AVProcessor

    hush_libraries()
    torch.manual_seed(0)
    backbones = folder / "backbones"
    llm = make_llm(backbones / "llm", initializer_range=0.6)
    talk_on(llm / "model.safetensors")
    world = World(
        folder,
        llm,
        make_siglip(backbones / "siglip"),
        make_whisper(backbones / "whisper"),
        folder,
        folder,
    )
    settings = world.model
    settings["encoders"] = {stream: settings["encoders"][stream] for stream in streams}
    settings["connector"] = [one for one in settings["connector"] if one["stream"] in streams]
    description = ModelConfig(**settings)
    tokenizer, ids = load_tokenizer(description)
    model = AVLLM.from_backbones(description, ids)
    save_checkpoint(model, AVProcessor.from_model(model, tokenizer), folder / "checkpoint", [])
    return folder / "checkpoint"


def talk_on(weights: Path) -> None:
    """Make the end of the answer unlikely, so that answers have many tokens, but not impossible."""
    state = load_file(weights)
    state["lm_head.weight"][2] *= 0.6
    save_file(state, weights, metadata={"format": "pt"})
