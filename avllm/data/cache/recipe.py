"""Say what decides a clip's features besides the clip."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from avllm.data.cache.disk import CacheError

FORMAT = 3  # of an entry: its checksum is in its shard's header


def weights_digest(module: nn.Module) -> str:
    """Return the SHA-256 over names, dtypes and bytes of all parameters and buffers."""
    total = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        values = tensor.detach().cpu().contiguous().flatten()
        total.update(values.view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def recipe(
    processor: Any,
    encoders: nn.ModuleDict,
    precision: str,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Return everything besides the clip that decides its features, JSON-able.

    Raises:
        CacheError: an encoder trains, so that features of now would be wrong a step later.
    """
    for stream, encoder in encoders.items():
        trained = [name for name, p in encoder.named_parameters() if p.requires_grad]
        if trained:
            raise CacheError(
                f"data.cache is set, but `trainable` trains encoders.{stream}.{trained[0]}; "
                "freeze the encoder or leave out data.cache",
                reason="trained_encoder",
            )
    return {
        "format": FORMAT,
        "preprocessing": {s: p.settings() for s, p in sorted(processor.preprocessors.items())},
        "sampling": repr(processor.sampling),
        "encoders": {s: encoder_recipe(e) for s, e in sorted(encoders.items())},
        "precision": precision,
        "dtype": dtype,
    }


def encoder_recipe(encoder: Any) -> dict[str, Any]:
    """Return what decides an encoder's features: class, weights, options (layers, tokens), config.

    The config's fields that name where it came from are left out: a later stage reads the same
    encoder from a checkpoint.
    """
    config = encoder.backbone_config.to_dict()
    origin = ("architectures", "dtype", "torch_dtype", "transformers_version")
    decisive = {k: v for k, v in config.items() if k not in origin and not k.startswith("_")}
    return {
        "class": f"{type(encoder).__module__}:{type(encoder).__qualname__}",
        "options": encoder.options(),
        "config": decisive,
        "weights": weights_digest(encoder),
    }
