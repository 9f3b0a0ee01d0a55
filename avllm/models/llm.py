"""Load the language model by name, quantised where asked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from avllm.config_model import LLMConfig
from avllm.errors import UserError, loading
from avllm.weights import (
    check_finite,
    check_model_folder,
    no_larger_than,
    size_of,
    weight_files,
)


def load_llm(settings: LLMConfig) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a causal LM by hub name or folder; return it with its record for the model's config.

    Raises:
        UserError: the name is neither a folder nor on the hub, weights are missing, left over or
            of another shape, or hold NaN.
    """
    dtype = getattr(torch, settings.dtype)
    check_model_folder(settings.name)
    with loading("the LLM", settings.name, "model.llm.name"):
        _try_size(settings)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            settings.name,
            revision=settings.revision,
            trust_remote_code=False,
            dtype=dtype,
            attn_implementation=attention(settings),
            quantization_config=quantization(settings.quantize, dtype),
            output_loading_info=True,
        )
    llm, report = loaded
    _check_report(settings.name, llm, report)
    check_finite(llm.named_parameters(), f"the LLM {settings.name}")
    if settings.quantize:
        keep_quantised_layers_trainable(llm)
    config = llm.config.to_dict()
    config.pop("quantization_config", None)
    return llm, {**settings.model_dump(), "config": config}


def attention(settings: LLMConfig) -> str | None:
    """Return transformers' name of the attention; None lets it choose what the LLM has."""
    return None if settings.attention == "auto" else settings.attention


def _try_size(settings: LLMConfig) -> None:
    """Build the LLM without weights, to stop where its config asks for more than its files hold."""
    files = weight_files(settings.name)
    if not files:
        return  # a hub name: its config and its weights are of one commit
    config = AutoConfig.from_pretrained(settings.name, trust_remote_code=False)
    with torch.device("meta"), no_larger_than(size_of(files), f"the LLM {settings.name}"):
        AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _check_report(name: str, llm: PreTrainedModel, report: dict[str, Any]) -> None:
    """Refuse weights that are missing, left over or of another shape.

    Transformers fills what is missing with random numbers and leaves out the rest.
    """
    missing = sorted(report["missing_keys"])
    wrong = sorted(str(key) for key in report["mismatched_keys"])
    unknown = sorted(report["unexpected_keys"])
    if missing or wrong or unknown:
        raise UserError(
            f"the LLM {name} does not fit {type(llm).__name__}: missing {missing[:3]}, wrong shape "
            f"{wrong[:3]}, unexpected {unknown[:3]}; expected the weights that its config.json "
            "describes. Copy the folder again",
            reason="weights",
        )


def quantization(kind: str | None, compute: torch.dtype) -> BitsAndBytesConfig | None:
    """Return QLoRA's settings (arXiv 2305.14314): NF4 with double quantisation, or LLM.int8()."""
    if kind is None:
        return None
    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def is_quantised(llm: PreTrainedModel) -> bool:
    """Return True if the weights were quantised while they were loaded."""
    return getattr(llm, "hf_quantizer", None) is not None


def keep_quantised_layers_trainable(llm: PreTrainedModel) -> None:
    """Switch off the CPU repacking of 4-bit weights.

    On CPUs with avx512_bf16 the first forward in eval mode without gradients repacks them for good:
    from then on the gradients through the layer are zero and a merge is wrong, without any error.
    """
    from bitsandbytes.nn import Linear4bit

    for module in llm.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def head_is_plain(llm: Any) -> bool:
    """Return True if the LLM's logits are its head applied to its last hidden states, unchanged.

    Soft caps and scales (Gemma 2, Cohere, ...) are found by a trial rather than by a list of
    architectures: a hook replaces the head's output by a ramp of large numbers, which has to come
    out unchanged.
    """
    head = llm.get_output_embeddings()
    training = llm.training
    head_inputs: list[Tensor] = []

    def return_ramp(_: Any, inputs: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        head_inputs.append(inputs[0])
        return _ramp_like(logits)

    handle = head.register_forward_hook(return_ramp)
    llm.eval()
    with torch.no_grad():
        ids = torch.tensor([[1, 2]], device=llm.get_input_embeddings().weight.device)
        logits = llm(input_ids=ids, use_cache=False).logits
        hidden = llm.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    handle.remove()
    llm.train(training)
    if len(head_inputs) != 1 or not torch.allclose(head_inputs[0], hidden):
        return False
    return torch.allclose(logits, _ramp_like(logits))


def _ramp_like(logits: Tensor) -> Tensor:
    """Return numbers from -100 to 100 over the vocabulary, in the shape of ``logits (..., V)``."""
    ramp = torch.linspace(-100, 100, logits.shape[-1], device=logits.device, dtype=logits.dtype)
    return ramp.expand_as(logits)
