"""Bring EVA ViT-g as LAVIS publishes it, ``eva_vit_g.pth``, into the form of encoder ``eva``."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from avllm.encoders._visual import BICUBIC, CLIP_MEAN, CLIP_STD
from avllm.encoders.eva import EvaConfig, EvaModel
from avllm.errors import UserError
from avllm.models.importing.base import BackboneFiles, Dims
from avllm.published import Published

NAMES = (
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^embeddings\.position_embedding$", "pos_embed"),
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^encoder\.layers\.(\d+)\.layer_norm(\d)\.", r"blocks.\1.norm\2."),
    (r"^encoder\.layers\.(\d+)\.self_attn\.projection\.", r"blocks.\1.attn.proj."),
    (r"^encoder\.layers\.(\d+)\.self_attn\.qkv\.", r"blocks.\1.attn.qkv."),
    (r"^encoder\.layers\.(\d+)\.mlp\.", r"blocks.\1.mlp."),
)
"""Beginnings of our names, and of the published ones."""

NORM = "post_layernorm."
QKV_BIAS = re.compile(r"encoder\.layers\.(\d+)\.self_attn\.qkv\.bias")
AFTER_BLOCKS = (r"(norm|fc_norm|head)\.(weight|bias)", r"mask_token")
"""Of the classifier that EVA was trained as."""


def eva_files(vit: Published, norm: Published, dims: Dims) -> BackboneFiles:
    """Read the vision transformer and the norm after it.

    BLIP-2 uses 39 of the 40 blocks in the file, so the blocks after ``vit.depth`` are left out.

    Args:
        vit: the transformer.
        norm: has the norm as ``ln_vision``.
        dims: section ``vit``.

    Raises:
        PublishedError: a tensor is missing, left over or of another shape.
        UserError: ``dims`` gives another size than the tensors have.
    """
    config = _config(vit, dims)
    with torch.device("meta"):
        expected = EvaModel(config).state_dict()
    inside: dict[str, Tensor] = {}
    after: dict[str, Tensor] = {}
    biases: list[int] = []
    for name, x in expected.items():
        bias = QKV_BIAS.fullmatch(name)
        if bias:
            biases.append(int(bias[1]))
        elif name.startswith(NORM):
            after[name] = x
        else:
            inside[name] = x
    state = vit.take(inside, _published)
    for number in biases:
        state[f"encoder.layers.{number}.self_attn.qkv.bias"] = _qkv_bias(vit, number)
    state |= norm.take(after, lambda own: own.replace(NORM, "ln_vision."))
    unused = [rf"blocks\.{number}\..*" for number in range(config.num_hidden_layers, _blocks(vit))]
    vit.leave([*AFTER_BLOCKS, *unused])
    vit.refuse_rest()
    config.dtype = state["embeddings.patch_embedding.weight"].dtype
    return BackboneFiles(config, state, _preprocessing(config))


def _blocks(vit: Published) -> int:
    return vit.blocks(r"blocks\.(\d+)\.")


def _config(vit: Published, dims: Dims) -> EvaConfig:
    width, _, patch, _ = vit.tensor("patch_embed.proj.weight").shape
    places = vit.tensor("pos_embed").shape[1]  # the class token's, then the grid's
    side = round((places - 1) ** 0.5)
    hidden = vit.tensor("blocks.0.mlp.fc1.weight").shape[0]
    dims.compare({"vit.img": side * patch, "vit.patch": patch, "vit.dim": width})
    depth = int(dims["vit.depth"] or min(39, _blocks(vit)))
    if depth > _blocks(vit):
        raise UserError(
            f"dims has vit.depth {depth}; {vit.path} has {_blocks(vit)} blocks. Correct it, or "
            "leave it out",
            reason="dims",
        )
    return EvaConfig(
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=depth,
        num_attention_heads=dims["vit.heads"],
        image_size=side * patch,
        patch_size=patch,
        layer_norm_eps=dims["vit.norm_eps"],
        post_norm_eps=dims["vit.post_norm_eps"],
    )


def _published(own: str) -> str:
    for pattern, theirs in NAMES:
        if re.match(pattern, own):
            return re.sub(pattern, theirs, own)
    return own


def _qkv_bias(vit: Published, number: int) -> Tensor:
    """Return the bias of queries, keys and values; EVA's keys have none."""
    query = vit.tensor(f"blocks.{number}.attn.q_bias")
    value = vit.tensor(f"blocks.{number}.attn.v_bias")
    return torch.cat([query, torch.zeros_like(query), value])


def _preprocessing(config: EvaConfig) -> dict[str, Any]:
    side = config.image_size
    return {
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "size": {"height": side, "width": side},
        "resample": BICUBIC,
        "rescale_factor": 1 / 255,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
    }
