"""One tiny config a family, and media that the tests make up. A new family is one new row."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import avllm.encoders
from avllm.encoders.base import Encoder
from avllm.tokens import EncoderInput, StreamBatch

VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "patch_size": 8,
    "image_size": 32,
    "initializer_range": 0.1,
}
SPEECH = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "conv_dim": [32, 32, 32],  # oneDNN errs in bfloat16 with 16
    "conv_kernel": [10, 8, 8],
    "conv_stride": [5, 8, 8],
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}
PE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "head_dim": 16,
    "initializer_range": 0.1,
}


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    """The config less some of its fields."""
    return {k: v for k, v in config.items() if k not in keys}


CONFIGS: dict[str, dict[str, Any]] = {
    "clip": VIT,
    "siglip": without(VIT, "initializer_range"),
    "siglip2": {**without(VIT, "initializer_range", "image_size"), "num_patches": 16},
    "eva": VIT,
    "dinov2": without(VIT, "intermediate_size"),
    "vit": VIT,
    "metaclip2": VIT,
    "intern_vit": VIT,
    "dinov2_registers": {**without(VIT, "intermediate_size"), "num_register_tokens": 2},
    "dinov3": {**VIT, "num_register_tokens": 2},
    "videomae": {**VIT, "num_frames": 4},
    "vjepa2": {
        **without(VIT, "intermediate_size", "image_size"),
        "crop_size": 32,
        "mlp_ratio": 2,
        "frames_per_clip": 4,
        "pred_hidden_size": 16,
        "pred_num_attention_heads": 2,
        "pred_num_hidden_layers": 1,
    },
    "pe_av_video": {**PE, "vision_config": {"model_type": "vit", **VIT, "num_labels": 24}},
    "pvt_v2": {
        "image_size": 32,
        "num_encoder_blocks": 4,
        "depths": [1, 1, 1, 1],
        "hidden_sizes": [8, 16, 16, 32],
        "num_attention_heads": [1, 2, 2, 2],
        "mlp_ratios": [2, 2, 2, 2],
        "patch_sizes": [7, 3, 3, 3],
        "strides": [2, 2, 1, 2],
        "sr_ratios": [2, 1, 1, 1],
        "initializer_range": 0.1,
    },
    "whisper": {
        "d_model": 32,
        "encoder_layers": 3,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "max_source_positions": 50,
        "num_mel_bins": 40,
    },
    "qwen2_audio": {
        "d_model": 32,
        "encoder_layers": 3,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "max_source_positions": 50,
        "num_mel_bins": 40,
    },
    "ast": {**without(VIT, "image_size", "patch_size"), "max_length": 128, "num_mel_bins": 32},
    "clap": {
        "spec_size": 64,
        "num_mel_bins": 16,
        "depths": [1, 1, 1],
        "num_attention_heads": [2, 2, 4],
        "patch_embeds_hidden_size": 16,
        "window_size": 2,
        "hidden_size": 64,
        "num_hidden_layers": 3,
    },
    "mel_conv": {
        "num_mel_bins": 40,
        "hidden_size": 32,
        "kernel_sizes": [3, 3, 5, 5],
        "strides": [1, 2, 1, 2],
        "max_frames": 100,
    },
    "imagebind": {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "projection_dim": 24,
        "num_mel_bins": 32,
        "frames": 60,
        "patch_size": 8,
        "patch_stride": 8,
    },
    "beats": {
        **without(VIT, "image_size", "initializer_range"),
        "embedding_size": 24,
        "num_mel_bins": 32,
        "conv_pos": 16,
        "conv_pos_groups": 2,
        "num_buckets": 32,
        "max_distance": 80,
    },
    "pe_av_audio": {
        **PE,
        "dac_config": {
            "model_type": "dac",
            "encoder_hidden_size": 4,
            "downsampling_ratios": [2, 8, 10, 12],
            "codebook_dim": 8,
        },
    },
    "wav2vec2": SPEECH,
    "hubert": {**SPEECH, "feat_extract_norm": "layer", "do_stable_layer_norm": True},
    "data2vec_audio": {
        **without(SPEECH, "num_conv_pos_embeddings", "num_feat_extract_layers"),
        "num_conv_pos_embeddings": 2,
        "conv_pos_kernel_size": 5,
    },
    "w2v_bert": {
        **without(VIT, "patch_size", "image_size", "initializer_range"),
        "feature_projection_input_dim": 40,
        "conv_depthwise_kernel_size": 3,
    },
    "wavlm": {**without(SPEECH, "num_feat_extract_layers"), "num_buckets": 16},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "wav2vec2": {"window": 1.0},
    "hubert": {"window": 1.0},
    "wavlm": {"window": 1.0},
    "w2v_bert": {"window": 1.0},
    "data2vec_audio": {"window": 1.0},
    "beats": {"window": 1.0},
    "pe_av_audio": {"window": 1.0},
    "imagebind": {"segments": 3, "seconds": 0.5},
}


@dataclass(frozen=True)
class Frames:
    """What an encoder sees of data.media.Frames."""

    x: Tensor
    span: Tensor
    regions: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Sound:
    """What an encoder sees of data.media.Sound."""

    x: Tensor
    rate: int
    start: float = 0.0


def frames(count: int, height: int = 40, width: int = 60, seed: int = 0) -> Frames:
    """Smooth coloured noise, half a second a frame."""
    noise = torch.rand(count, 3, 5, 7, generator=torch.Generator().manual_seed(seed))
    x = torch.nn.functional.interpolate(noise, (height, width), mode="bilinear") * 255
    edges = torch.arange(count + 1) * 0.5
    return Frames(
        x.permute(0, 2, 3, 1).round().to(torch.uint8).contiguous(),
        torch.stack([edges[:-1], edges[1:]], 1),
    )


def sound(seconds: float, rate: int, start: float = 0.0, seed: int = 0) -> Sound:
    """A tone that wanders in noise."""
    n = round(seconds * rate)
    t = torch.arange(n) / rate
    noise = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    return Sound(0.3 * torch.sin(2 * torch.pi * (300 + 40 * t) * t) + 0.05 * noise, rate, start)


FOLDER = Path(avllm.encoders.__file__).parent
KEYS = sorted(
    f.stem for f in FOLDER.glob("*.py") if not f.stem.startswith("_") and f.stem != "base"
)
SPEECH_KEYS = ["wav2vec2", "hubert", "wavlm", "data2vec_audio"]
SOUNDS = [
    "whisper",
    "qwen2_audio",
    "w2v_bert",
    "ast",
    "clap",
    "mel_conv",
    "beats",
    "pe_av_audio",
    *SPEECH_KEYS,
]


def family(key: str) -> type[Encoder]:
    """The file's public encoder class."""
    module = importlib.import_module(f"avllm.encoders.{key}")
    (found,) = [
        c
        for n, c in vars(module).items()
        if isinstance(c, type)
        and issubclass(c, Encoder)
        and c.__module__ == module.__name__
        and n[0] != "_"
    ]
    return found


def build(key: str, **options) -> Encoder:
    """A tiny encoder with the same weights each time."""
    torch.manual_seed(0)
    return family(key)(CONFIGS[key], **{**OPTIONS.get(key, {}), **options}).eval()


def some_media(encoder: Encoder, size: int):
    """Media of two to four units, of another length and shape for each size."""
    if encoder.medium == "video":
        return frames(size, 40 + 10 * size, 60, seed=size)
    return sound(0.45 * size, encoder.preprocessor().rate, seed=size)


def collate(clips: list[EncoderInput]) -> StreamBatch:
    """Units in a row, clocks and masks padded."""
    steps = max(len(c.span) for c in clips)
    span = torch.stack(
        [torch.nn.functional.pad(c.span, (0, 0, 0, steps - len(c.span))) for c in clips]
    )
    mask = torch.stack(
        [torch.nn.functional.pad(c.mask, (0, 0, 0, steps - len(c.mask))) for c in clips]
    )
    inputs = {k: torch.cat([c.inputs[k] for c in clips]) for k in clips[0].inputs}
    units = torch.tensor([len(next(iter(c.inputs.values()))) for c in clips])
    return StreamBatch(inputs, units, span, mask)


@torch.no_grad()
def encode(encoder: Encoder, clips: list[EncoderInput]) -> dict[str, Tensor]:
    return {k: t.x * t.mask[..., None] for k, t in encoder.encode(collate(clips)).items()}
