"""Every shipped preset parses, composes, and trains the parameters that its rules speak of.

Those of the literature's systems are built at full size, too, without weights, and a clip of the
paper's length becomes the paper's number of tokens. Folders ``SYSTEM/toy`` hold small versions.
"""

from __future__ import annotations

import copy
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from real_sizes import ENCODERS, LLMS
from tiny import World, make_world
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from avllm.config import RunConfig, load_config
from avllm.config_model import ModelConfig
from avllm.data.manifest import read_manifest
from avllm.data.media.clip import Sound
from avllm.data.media.sampling import Sampling
from avllm.encoders.base import Encoder
from avllm.models.building.placeholders import load_tokenizer
from avllm.models.configuration_avllm import AVConfig
from avllm.models.modeling_avllm import AVLLM
from avllm.models.processing_avllm import AVProcessor
from avllm.models.words import load_words
from avllm.registry import build, load
from avllm.streams import medium_of
from avllm.tokens import Grid
from avllm.training.optim import apply_rules, check_lora_trains, named_parameters
from avllm.training.start import STAGES_BEFORE
from avllm.training.task import Task

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "train" / "presets"
PRESETS = sorted(FOLDER.rglob("*.yaml"))
SYSTEMS = sorted({path.parent for path in PRESETS if path.parent.parent == FOLDER})
NOT_FULL_SIZE = {"toy", "esc10"}  # worlds of this project
ON_TOP = {"modality_interference", "sentinel"}  # further stages of a system
VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "patch_size": 8,
    "image_size": 144,  # 18 x 18 patches, which 2 divides, and 3 twice
}
SPEECH = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "conv_dim": [16, 16],
    "conv_kernel": [10, 8],
    "conv_stride": [5, 64],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}
BACKBONES: dict[str, dict[str, Any]] = {
    "siglip": VIT,
    "clip": VIT,
    "eva": VIT,
    "dinov2": {k: v for k, v in VIT.items() if k != "intermediate_size"},
    # As many layers as at full size, of which presets take some.
    "ast": {k: v for k, v in VIT.items() if k != "image_size"}
    | {"num_hidden_layers": 12, "max_length": 128, "num_mel_bins": 128, "patch_size": 16},
    "pvt_v2": {
        "image_size": 32,
        "num_encoder_blocks": 2,
        "depths": [1, 1],
        "hidden_sizes": [16, 32],
        "num_attention_heads": [1, 2],
        "mlp_ratios": [2, 2],
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "sr_ratios": [2, 1],
    },
    "whisper": {
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "max_source_positions": 100,
    },
    "clap": {
        "patch_embeds_hidden_size": 16,
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [2, 2, 4, 4],
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "enable_fusion": True,
    },
    "imagebind": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "projection_dim": 32,
    },
    "beats": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "embedding_size": 32,
        "conv_pos_groups": 4,
    },
    "wav2vec2": SPEECH,
    "mel_conv": {"hidden_size": 32},
}
SHRUNK: dict[str, dict[str, int]] = {
    "qformer": {"dim": 32, "heads": 2, "layers": 2},
    "causal_qformer": {"dim": 32, "heads": 2, "layers": 2, "causal_dim": 32, "causal_heads": 2},
    "clue_aggregator": {"dim": 32, "heads": 2, "layers": 2},
    "layer_aggregator": {"heads": 2},
    "perceiver": {"heads": 2, "layers": 2},
    "region_packer": {"heads": 2},
    "stc": {"group": 8},
    "temporal_encoder": {"heads": 2},
    "universal_projection": {"heads": 2},
    "dynamic_prompt": {"heads": 2},
}
"""Options by adapter that fit to tiny backbones."""


def label(path: Path) -> str:
    """The place of a preset or of its folder under train/presets."""
    return str(path.relative_to(FOLDER).with_suffix(""))


@cache
def preset_of(output: str) -> Path:
    """The preset whose run writes a folder."""
    (path,) = [
        path
        for folder in SYSTEMS
        for path in folder.glob("*.yaml")
        if load_config(path).output == output
    ]
    return path


@pytest.mark.parametrize("path", PRESETS, ids=label)
def test_preset_parses_and_says_its_stage(path: Path) -> None:
    config = load_config(path)
    assert path.stem.split("_", 1)[1] == config.stage, "a preset is called stageN_<its stage>"
    first = config.init is None
    assert (config.model is not None) == first
    assert config.init_from_scratch == (first and config.stage != "align")
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60, "a preset is a page"


@pytest.mark.parametrize("folder", SYSTEMS, ids=label)
def test_stages_follow_each_other(folder: Path) -> None:
    stages = [load_config(path) for path in sorted(folder.glob("*.yaml"))]
    for before, stage in zip(stages, stages[1:], strict=False):
        assert stage.init == before.output
        assert before.stage in (*STAGES_BEFORE[stage.stage], stage.stage)
    first = stages[0]
    if folder.name in ON_TOP:
        base = preset_of(str(first.init))
        assert load_config(base).stage in STAGES_BEFORE[first.stage]
        assert base == sorted(base.parent.glob("*.yaml"))[-1], "it goes on from a finished system"
    else:
        assert first.model is not None


def chain(folder: Path) -> list[RunConfig]:
    """The stages of a system, and before them those of the system that it goes on from."""
    stages = [load_config(path) for path in sorted(folder.glob("*.yaml"))]
    init = stages[0].init
    if init is None:
        return stages
    return [*chain(preset_of(init).parent), *stages]


def small(model: ModelConfig, llm: Path) -> ModelConfig:
    """The same composition on tiny random backbones, for a few frames."""
    settings = copy.deepcopy(model.model_dump())
    settings["llm"] = {"name": str(llm)}
    settings["sampling"] = {"num_frames": 6}
    for spec in settings["encoders"].values():
        spec.pop("name", None)
        spec.pop("dtype", None)
        spec.setdefault("config", BACKBONES[spec["type"]])
        if spec["type"] in ("beats", "wav2vec2"):
            spec["window"] = 1.0  # a test's clip is padded to it
    for spec in settings["connector"]:
        spec.pop("init", None)
        spec |= SHRUNK.get(spec["type"], {})
        if spec.get("instruction"):
            spec["instruction"] = "llm"  # no tokenizer is downloaded
    return ModelConfig.model_validate(settings)


def offline(objectives: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The objectives with the LLM for a text encoder that would be downloaded."""
    return [spec | {"text": "llm"} if "/" in spec.get("text", "") else spec for spec in objectives]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), clips=2)


@pytest.mark.parametrize("folder", SYSTEMS, ids=label)
def test_each_stage_finds_its_parameters_and_gives_them_gradients(
    folder: Path, world: World
) -> None:
    stages = chain(folder)
    assert stages[0].model is not None
    description = small(stages[0].model, world.llm)
    tokenizer, ids = load_tokenizer(description)
    torch.manual_seed(0)
    model = AVLLM.from_backbones(description, ids, load_words(tokenizer, description))
    processor = AVProcessor.from_model(model, tokenizer)
    processor.max_length = 8192
    batch = processor(read_manifest(world.questions), world.questions.parent, answer=True)
    for stage in stages:
        for lora in stage.lora:
            model.add_lora(lora)
        task = Task(model, offline(stage.objectives))
        shares = apply_rules(task, stage.trainable)
        check_lora_trains(shares, [lora.name for lora in stage.lora], model.config.active_lora)
        if stage.stage == "prefer":  # the rows have no rejected answers
            continue
        losses = [objective(model, batch)[0] for objective in task.objectives.values()]
        torch.stack(losses).sum().backward()
        trained = {n: p for n, p in named_parameters(task).items() if p.requires_grad}
        assert trained
        assert [name for name, p in trained.items() if p.grad is None] == []
        task.zero_grad()


# ---- full size -----------------------------------------------------------------------------------

CLIPS: dict[str, tuple[float, dict[str, int], str]] = {
    "video_llama": (60.0, {"video": 32, "audio": 8}, "arXiv 2306.02858, 2.1; its code's queries"),
    "favor": (10.0, {"av": 2 * 32}, "2 windows of 10 frames at 2 Hz, 32 queries each: its code"),
    "avicuna": (100.0, {"video": 75, "audio": 25}, "arXiv 2403.16276, 3.2: 100 tokens, r = 0.25"),
    "cat": (60.0, {"video": 32, "audio": 32, "scene": 1, "sounds": 1}, "its code"),
    "gama": (10.24, {"audio": 32, "details": 64}, "32 queries, 64 steps of 10.24 s: its code"),
    "apt": (10.0, {"audio": 32}, "BLIP-2's 32 queries, on whose code it is built"),
    "llama_mtsk": (10.0, {"audio": 125, "video": 125}, "50 Hz by 4, 25 Hz by 2: arXiv 2503.06362"),
    "vlap": (10.0, {"video": 50}, "a picture's 49 patches and class token of ViT-B/32: its code"),
    "blip3_video": (60.0, {"video": 32}, "arXiv 2410.16267, the title"),
    "lita": (120.0, {"video": 100, "slow": 256}, "arXiv 2403.19046, 3.3: 356 in all"),
    "llava_st": (120.0, {"slow": 20 * 81, "video": 100 * 9}, "arXiv 2501.08282, 3.2; its code"),
    "cosmo": (10.0, {"video": 64}, "64 latents a clip, beside the sequence: its code"),
    "soundclip": (3.0, {"video": 1}, "one token in the class token's place: arXiv 2506.10416"),
    "lstp": (180.0, {"video": 4 * 32}, "4 frames of 32 queries: its configs"),
    "salmonn": (29.92, {"speech": 88}, "arXiv 2310.13289, 3.1: 88 windows of 17 steps"),
    "videollama2": (9.92, {"video": 576, "audio": 496}, "arXiv 2406.07476, 3.1; BEATs' 62 x 8"),
    "tsadp": (10.0, {"prompt": 8, "video": 20 * 16}, "ours: the paper gives no sizes"),
    "oneencoder": (10.0, {"video": 8, "audio": 10}, "ours: one token a frame, one a second"),
    "qwen_av": (10.0, {"video": 20 * 16, "audio": 20 * 4}, "ours: 16 a frame, 4 each half second"),
}
"""By system: seconds of a clip, the tokens that it becomes by stream, and where that is said."""


def test_every_full_size_system_has_its_number_of_tokens() -> None:
    assert {folder.name for folder in SYSTEMS} - NOT_FULL_SIZE - ON_TOP == set(CLIPS)


def test_the_page_of_systems_lists_each() -> None:
    page = (ROOT / "docs" / "systems.md").read_text(encoding="utf-8")
    for folder in SYSTEMS:
        if folder.name not in NOT_FULL_SIZE:
            assert re.search(rf"^\| `(train/presets/)?{folder.name}` \|", page, re.MULTILINE)


@cache
def full_llm(name: str) -> PreTrainedModel:
    """An LLM of its real size, without weights."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**LLMS[name])
        )
    return model


def full_encoder(spec: dict[str, Any]) -> Encoder:
    """An encoder of its real size, without weights."""
    options = {k: v for k, v in spec.items() if k not in ("medium", "type", "name", "dtype")}
    with torch.device("meta"):
        encoder: Encoder = load("encoders", spec["type"])(ENCODERS[spec["name"]], **options)
    return encoder


def heard_or_seen(encoder: Encoder, model: ModelConfig, seconds: float) -> Grid:
    """Clock and mask of what an encoder makes of a clip; frames are counted and not decoded."""
    preprocessor = encoder.preprocessor()
    if encoder.medium == "audio":
        sound = torch.zeros(round(seconds * preprocessor.rate))
        return preprocessor(Sound(sound, preprocessor.rate, 0.0), seconds).grid
    sampling = model.sampling.model_dump()
    if model.selector is not None:
        sampling = {"num_frames": model.selector["frames"]}
    span = torch.tensor(Sampling(**sampling).spans(seconds))
    return Grid(span, torch.ones(len(span), preprocessor.tokens, dtype=torch.bool))


@pytest.mark.parametrize("name", CLIPS)
def test_a_full_size_model_makes_the_number_of_tokens_of_its_paper(name: str) -> None:
    seconds, expected, source = CLIPS[name]
    (first,) = [c for c in map(load_config, sorted((FOLDER / name).glob("*.yaml"))) if c.model]
    assert first.model is not None
    model = first.model
    for spec in model.connector:
        if spec.get("instruction"):
            spec["instruction"] = "llm"  # its tokenizer would be downloaded
    encoders = {stream: full_encoder(spec) for stream, spec in model.encoders.items()}
    records = {s: spec | {"medium": medium_of(s, spec)} for s, spec in model.encoders.items()}
    ids = {stream: 10**6 + number for number, stream in enumerate([*encoders, *expected])}
    llm = {"name": model.llm.name, "config": LLMS[model.llm.name]}
    with torch.device("meta"):
        built = AVLLM(AVConfig.of(model, llm, records, ids), full_llm(model.llm.name), encoders)
    grids: dict[str, Grid] = {}
    for stream, encoder in sorted(encoders.items()):
        grid = heard_or_seen(encoder, model, seconds)
        for layer in encoder.layer_names:
            grids[f"{stream}.{layer}" if layer else stream] = grid
    made = built.connector.output_grid(grids)
    assert {stream: grid.places for stream, grid in made.items()} == expected, source
    fused = set(model.fusion["streams"]) if model.fusion else set()
    order = build("layouts", model.layout).order({s: g for s, g in made.items() if s not in fused})
    assert len(order) == sum(n for stream, n in expected.items() if stream not in fused)
