"""Configs of the backbones that presets name, by hub name, so that nothing is downloaded.

The numbers are those of each checkpoint's ``config.json``; the rest is the family's default.
"""

from __future__ import annotations

from typing import Any


def vit(width: int, layers: int, heads: int, hidden: int, patch: int, image: int) -> dict[str, int]:
    """A vision transformer."""
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": hidden,
        "patch_size": patch,
        "image_size": image,
    }


def whisper(width: int, layers: int, heads: int) -> dict[str, int]:
    """A Whisper encoder; all sizes hear 30 s in 1,500 steps."""
    return {
        "d_model": width,
        "encoder_layers": layers,
        "encoder_attention_heads": heads,
        "encoder_ffn_dim": 4 * width,
        "num_mel_bins": 80,
        "max_source_positions": 1500,
    }


ENCODERS: dict[str, dict[str, Any]] = {
    "openai/clip-vit-base-patch32": vit(768, 12, 12, 3072, 32, 224),
    "openai/clip-vit-large-patch14": vit(1024, 24, 16, 4096, 14, 224),
    "openai/clip-vit-large-patch14-336": vit(1024, 24, 16, 4096, 14, 336),
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": vit(1280, 32, 16, 5120, 14, 224),
    "google/siglip-so400m-patch14-384": vit(1152, 27, 16, 4304, 14, 384),
    "google/siglip2-base-patch16-256": vit(768, 12, 12, 3072, 16, 256),
    "Salesforce/blip2-opt-2.7b": vit(1408, 39, 16, 6144, 14, 224),
    "facebook/dinov2-base": {"patch_size": 14, "image_size": 518},
    "openai/whisper-small": whisper(768, 12, 12),
    "openai/whisper-medium.en": whisper(1024, 24, 16),
    "openai/whisper-large-v2": whisper(1280, 32, 20),
    "MIT/ast-finetuned-audioset-10-10-0.4593": {},
    "laion/clap-htsat-fused": {"enable_fusion": True},
    "facebook/wav2vec2-base-960h": {},
    "imagebind_huge.pth": {},
    "BEATs_iter3_plus_AS2M_finetuned_on_AS2M_cpt2.pt": {},
}


def decoder(
    kind: str, width: int, layers: int, heads: int, hidden: int, words: int, groups: int = 0
) -> dict[str, Any]:
    """An LLM of Llama's kind; ``groups`` is its number of keys and values where they are shared."""
    return {
        "model_type": kind,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups or heads,
        "intermediate_size": hidden,
        "vocab_size": words,
        "pad_token_id": None,
    }


LLAMA_7B = decoder("llama", 4096, 32, 32, 11008, 32000)
LLAMA_13B = decoder("llama", 5120, 40, 40, 13824, 32000)
LLMS: dict[str, dict[str, Any]] = {
    "lmsys/vicuna-7b-v1.1": LLAMA_7B,
    "lmsys/vicuna-7b-v1.5": LLAMA_7B,
    "meta-llama/Llama-2-7b-chat-hf": LLAMA_7B,
    "lmsys/vicuna-13b-v1.1": LLAMA_13B,
    "lmsys/vicuna-13b-v1.3": LLAMA_13B,
    "lmsys/vicuna-13b-v1.5": LLAMA_13B,
    "meta-llama/Llama-3.1-8B": decoder("llama", 4096, 32, 32, 14336, 128256, 8),
    "mistralai/Mistral-7B-Instruct-v0.2": decoder("mistral", 4096, 32, 32, 14336, 32000, 8),
    "microsoft/Phi-3-mini-4k-instruct": decoder("phi3", 3072, 32, 32, 8192, 32064),
    "Qwen/Qwen2-7B-Instruct": decoder("qwen2", 3584, 28, 28, 18944, 152064, 4),
    "Qwen/Qwen2.5-1.5B-Instruct": decoder("qwen2", 1536, 28, 12, 8960, 151936, 2),
    "facebook/opt-1.3b": {
        "model_type": "opt",
        "hidden_size": 2048,
        "word_embed_proj_dim": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "ffn_dim": 8192,
        "vocab_size": 50272,
    },
    "togethercomputer/RedPajama-INCITE-Chat-3B-v1": {
        "model_type": "gpt_neox",
        "hidden_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "intermediate_size": 10240,
        "vocab_size": 50432,
    },
}
