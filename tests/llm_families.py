"""Name LLM architectures of transformers, each with tiny sizes, and how it differs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tiny import make_tokenizer

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256}
SSM = {"state_size": 8, "conv_kernel": 4, "expand": 2}
MOE = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
MAMBA2 = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
    "mamba_expand": 2,
    "mamba_d_conv": 4,
}
MLA = {
    "num_key_value_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
EXPERTS = {
    **MOE,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
}
LAYERED = {
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
    "num_kv_shared_layers": 0,
    "altup_num_inputs": 2,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "activation_sparsity_pattern": [0.0, 0.0],
}


@dataclass(frozen=True)
class Family:
    """An architecture.

    Attributes:
        changes: options of its config beside ``SIZES``.
        kind: what it has that others have not.
        refused: why training refuses it before its first step: a reason of ``LLMError``.
        noise: weights that begin at 0 are drawn: they hide what a trained LLM reads.
    """

    changes: dict[str, Any] = field(default_factory=dict)
    kind: str = ""
    refused: str | None = None
    noise: bool = False


FAMILIES: dict[str, Family] = {
    "apertus": Family(),
    "arcee": Family(),
    "bamba": Family(
        {**MAMBA2, "attn_layer_indices": [1]}, "attention beside Mamba-2", refused="generation"
    ),
    "bloom": Family({"n_layer": 2, "n_head": 2}, "ALiBi"),
    "codegen": Family({**GPT, "num_attention_heads": 4, "rotary_dim": 4, "n_ctx": 256}),
    "cohere": Family({"logit_scale": 0.5}, "scaled logits"),
    "cohere2": Family(
        {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    ),
    "deepseek_v2": Family(
        {**MLA, **EXPERTS, "q_lora_rank": None, "head_dim": None}, "latent attention"
    ),
    "deepseek_v3": Family({**MLA, **EXPERTS, "head_dim": None}, "latent attention, MoE"),
    "diffllama": Family({"num_key_value_heads": 2}, "differential attention"),
    "ernie4_5": Family(),
    "exaone4": Family(
        {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    ),
    "falcon": Family(
        {"head_dim": None, "multi_query": True, "new_decoder_architecture": False}, "multi-query"
    ),
    "falcon_h1": Family(
        {**MAMBA2, "mamba_d_ssm": 64}, "attention and Mamba-2 in a layer", refused="generation"
    ),
    "falcon_mamba": Family(SSM, "states"),
    "gemma": Family({}, "scaled embeddings"),
    "gemma2": Family({"sliding_window": 8, "query_pre_attn_scalar": 16}, "soft caps"),
    "gemma3_text": Family(
        {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    ),
    "glm": Family(),
    "glm4": Family(),
    "glm4_moe": Family(EXPERTS),
    "gpt2": Family({}, "absolute positions, tied embeddings"),
    "gpt_bigcode": Family({**GPT, "multi_query": True}, "absolute positions, multi-query"),
    "gpt_neo": Family(
        {
            "num_layers": 2,
            "num_heads": 2,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
        }
    ),
    "gpt_neox": Family({"rotary_pct": 0.5}),
    "gpt_oss": Family(
        {**MOE, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        "sinks",
    ),
    "gptj": Family({**GPT, "rotary_dim": 8}),
    "granite": Family({"embedding_multiplier": 2.0, "logits_scaling": 2.0}),
    "granitemoe": Family(MOE),
    "helium": Family(),
    "jamba": Family(
        {
            **MOE,
            "mamba_d_state": 8,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "use_mamba_kernels": False,
        }
    ),
    "lfm2": Family(
        {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
        "convolutions",
    ),
    "llama": Family(),
    "mamba": Family(SSM, "states"),
    "mamba2": Family(
        {**SSM, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 16}, "states"
    ),
    "mistral": Family({"sliding_window": 8}, "sliding window"),
    "mixtral": Family(MOE, "MoE"),
    "mpt": Family({"d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 256}, "ALiBi"),
    "nemotron": Family(),
    "olmo": Family(),
    "olmo2": Family(),
    "olmoe": Family(MOE),
    "opt": Family({"ffn_dim": 64, "word_embed_proj_dim": 32}, "absolute positions from the mask"),
    "persimmon": Family({"partial_rotary_factor": 0.5}),
    "phi": Family({"partial_rotary_factor": 0.5}),
    "phi3": Family(),
    "qwen2": Family({"tie_word_embeddings": True}, "tied embeddings"),
    "qwen2_moe": Family({**MOE, "shared_expert_intermediate_size": 32, "decoder_sparse_step": 1}),
    "qwen3": Family(),
    "qwen3_moe": Family(MOE),
    "qwen3_next": Family(
        {
            **MOE,
            "shared_expert_intermediate_size": 32,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 2,
            "linear_num_key_heads": 1,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        "linear attention",
    ),
    "recurrent_gemma": Family(
        {"lru_width": 32, "attention_window_size": 8, "block_types": ["recurrent", "attention"]}
    ),
    "rwkv": Family(
        {"attention_hidden_size": 32, "context_length": 256}, "states", refused="generation"
    ),
    "smollm3": Family({}, "layers without positions"),
    "stablelm": Family(),
    "starcoder2": Family(),
    "xglm": Family(
        {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 2}, "sinusoids"
    ),
    "zamba2": Family(
        {
            **MAMBA2,
            "attention_head_dim": 32,
            "layer_types": ["mamba", "hybrid"],
            "hybrid_layer_ids": [1],
            "num_mem_blocks": 1,
            "adapter_rank": 4,
        },
        refused="generation",
    ),
    "gemma3": Family(
        {"text_config": "gemma3_text", "vision_config": VISION},
        "a vision tower",
        refused="generation",
    ),
    "gemma3n_text": Family(LAYERED, "embeddings of each layer", refused="embeddings", noise=True),
}


def make_family(name: str, folder: Path) -> Path:
    """Write a tiny LLM of an architecture with random weights, and its tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = make_tokenizer(folder)
    family = FAMILIES[name]
    options: dict[str, Any] = {**SIZES, "vocab_size": len(tokenizer), **family.changes}
    if options.get("head_dim", 0) is None:
        del options["head_dim"]
    if isinstance(
        options.get("text_config"), str
    ):  # a model of pictures and text: sizes are the text model's
        options["text_config"] = {**SIZES, "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **options))
    if family.noise:
        for parameter in llm.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.5)
    llm.save_pretrained(folder)
    return folder
