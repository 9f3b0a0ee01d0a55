"""The original models in plain functions of their published tensors, and such tensors at any size.

They are written from the papers and the published names, and share nothing with the package.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


# ---- tensors --------------------------------------------------------------------------------


@dataclass
class Maker:
    """Draws tensors by name."""

    seed: int = 0

    def __post_init__(self) -> None:
        self.random = torch.Generator().manual_seed(self.seed)  # on the CPU
        self.state: State = {}

    def draw(self, name: str, *shape: int, std: float = 0.2) -> None:
        if torch.get_default_device().type == "meta":  # shapes alone
            self.state[name] = torch.empty(shape)
        else:
            self.state[name] = std * torch.randn(*shape, generator=self.random)

    def norm(self, name: str, width: int) -> None:
        self.draw(f"{name}.weight", width)
        self.state[f"{name}.weight"] += 1
        self.draw(f"{name}.bias", width)

    def linear(self, name: str, inside: int, outside: int) -> None:
        self.draw(f"{name}.weight", outside, inside)
        self.draw(f"{name}.bias", outside)


def make_eva(width=16, depth=2, hidden=36, side=3, patch=14, unused=1, std=0.2) -> State:
    """`eva_vit_g.pth`; blocks after `depth` are not used."""
    make = Maker(1)
    make.draw("cls_token", 1, 1, width, std=std)
    make.draw("pos_embed", 1, 1 + side * side, width, std=std)
    make.draw("patch_embed.proj.weight", width, 3, patch, patch, std=std / patch)
    make.draw("patch_embed.proj.bias", width, std=std)
    for number in range(depth + unused):
        block = f"blocks.{number}"
        make.norm(f"{block}.norm1", width)
        make.draw(f"{block}.attn.q_bias", width)
        make.draw(f"{block}.attn.v_bias", width)
        make.draw(f"{block}.attn.qkv.weight", 3 * width, width)
        make.linear(f"{block}.attn.proj", width, width)
        make.norm(f"{block}.norm2", width)
        make.linear(f"{block}.mlp.fc1", width, hidden)
        make.linear(f"{block}.mlp.fc2", hidden, width)
    return make.state


def make_qformer(
    prefix, queries, count, seen, width=24, layers=4, every=2, hidden=40, text=False, seed=2
) -> State:
    """A Q-Former of LAVIS; `text` adds what reads texts."""
    make = Maker(seed)
    make.draw(queries, 1, count, width, std=1.0)
    make.state[f"{prefix}embeddings.position_ids"] = torch.arange(8)[None]
    make.norm(f"{prefix}embeddings.LayerNorm", width)
    for number in range(layers):
        layer = f"{prefix}encoder.layer.{number}"
        kinds = [("attention", width)]
        if number % every == 0:
            kinds.append(("crossattention", seen))
        for kind, inside in kinds:
            make.linear(f"{layer}.{kind}.self.query", width, width)
            make.linear(f"{layer}.{kind}.self.key", inside, width)
            make.linear(f"{layer}.{kind}.self.value", inside, width)
            make.linear(f"{layer}.{kind}.output.dense", width, width)
            make.norm(f"{layer}.{kind}.output.LayerNorm", width)
        for end in ["_query", ""] if text else ["_query"]:
            make.linear(f"{layer}.intermediate{end}.dense", width, hidden)
            make.linear(f"{layer}.output{end}.dense", hidden, width)
            make.norm(f"{layer}.output{end}.LayerNorm", width)
    if text:
        make.draw(f"{prefix}embeddings.word_embeddings.weight", 11, width)
        make.draw(f"{prefix}embeddings.position_embeddings.weight", 8, width)
        make.linear("Qformer.cls.predictions.decoder", width, 11)
    return make.state


def make_imagebind(width=16, depth=2, out=12, patches=(7, 9), kernel=16) -> State:
    """`imagebind_huge.pth`, of the other modalities a tensor each."""
    make = Maker(3)
    stem, trunk = "modality_preprocessors.audio", "modality_trunks.audio"
    make.draw(f"{stem}.cls_token", 1, 1, width)
    make.draw(f"{stem}.rgbt_stem.proj.weight", width, 1, kernel, kernel)
    make.norm(f"{stem}.rgbt_stem.norm_layer", width)
    make.draw(f"{stem}.pos_embedding_helper.pos_embed", 1, 1 + patches[0] * patches[1], width)
    for number in range(depth):
        block = f"{trunk}.blocks.{number}"
        make.draw(f"{block}.attn.in_proj_weight", 3 * width, width)
        make.draw(f"{block}.attn.in_proj_bias", 3 * width)
        make.draw(f"{block}.attn.bias_k", 1, 1, width)
        make.draw(f"{block}.attn.bias_v", 1, 1, width)
        make.linear(f"{block}.attn.out_proj", width, width)
        make.norm(f"{block}.norm_1", width)
        make.linear(f"{block}.mlp.fc1", width, 4 * width)
        make.linear(f"{block}.mlp.fc2", 4 * width, width)
        make.norm(f"{block}.norm_2", width)
    make.norm("modality_heads.audio.0", width)
    make.draw("modality_heads.audio.2.weight", out, width)
    make.state["modality_postprocessors.audio.1.log_logit_scale"] = torch.tensor(20.0).log()
    make.draw("modality_preprocessors.text.token_embedding.weight", 5, 4)
    make.draw("modality_trunks.vision.blocks.0.norm_1.weight", 4)
    make.draw("modality_heads.imu.3.weight", 4, 4)
    return make.state


def make_stc(seen=12, hidden=8, depth=2, out=32, squeeze=3) -> State:
    """The tensors of VideoLLaMA2's `mm_projector.bin`: timm's RegNet stages."""
    make = Maker(4)
    for stage, first in (("s1", seen), ("s2", hidden)):
        inside = first
        for number in range(1, depth + 1):
            block = f"model.mm_projector.{stage}.b{number}"
            make.draw(f"{block}.conv1.conv.weight", hidden, inside, 1, 1)
            make.norm(f"{block}.conv1.bn", hidden)
            make.draw(f"{block}.conv2.conv.weight", hidden, 1, 3, 3)
            make.norm(f"{block}.conv2.bn", hidden)
            between = inside // 4 if inside != seen else squeeze
            make.draw(f"{block}.se.fc1.weight", between, hidden, 1, 1)
            make.draw(f"{block}.se.fc1.bias", between)
            make.draw(f"{block}.se.fc2.weight", hidden, between, 1, 1)
            make.draw(f"{block}.se.fc2.bias", hidden)
            make.draw(f"{block}.conv3.conv.weight", hidden, hidden, 1, 1)
            make.norm(f"{block}.conv3.bn", hidden)
            if inside != hidden:
                make.draw(f"{block}.downsample.conv.weight", hidden, inside, 1, 1)
                make.norm(f"{block}.downsample.bn", hidden)
            inside = hidden
    make.draw("model.mm_projector.sampler.0.weight", hidden, hidden, 2, 2, 2)
    make.draw("model.mm_projector.sampler.0.bias", hidden)
    make.linear("model.mm_projector.readout.0", hidden, out)
    make.linear("model.mm_projector.readout.2", out, out)
    return make.state


BEATS = {
    "input_patch_size": 16,
    "embed_dim": 12,
    "encoder_layers": 2,
    "encoder_embed_dim": 16,
    "encoder_ffn_embed_dim": 20,
    "encoder_attention_heads": 2,
    "deep_norm": True,
    "conv_pos": 6,
    "conv_pos_groups": 4,
    "relative_position_embedding": True,
    "num_buckets": 16,
    "max_distance": 40,
    "gru_rel_pos": True,
    "layer_norm_first": False,
    "activation_fn": "gelu",
}


def make_beats() -> State:
    """The tensors of `BEATs_*.pt` with the settings above, and a predictor."""
    make = Maker(13)
    make.draw("patch_embedding.weight", 12, 1, 16, 16, std=0.02)
    make.norm("layer_norm", 12)
    make.linear("post_extract_proj", 12, 16)
    make.draw("encoder.pos_conv.0.weight_g", 1, 1, 6, std=1.0)
    make.draw("encoder.pos_conv.0.weight_v", 16, 4, 6)
    make.draw("encoder.pos_conv.0.bias", 16)
    make.norm("encoder.layer_norm", 16)
    make.draw("encoder.layers.0.self_attn.relative_attention_bias.weight", 16, 2, std=1.0)
    shared = make.state["encoder.layers.0.self_attn.relative_attention_bias.weight"]
    for number in range(2):
        layer = f"encoder.layers.{number}"
        make.state[f"{layer}.self_attn.relative_attention_bias.weight"] = shared
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            make.linear(f"{layer}.self_attn.{name}", 16, 16)
        make.linear(f"{layer}.self_attn.grep_linear", 8, 8)
        make.draw(f"{layer}.self_attn.grep_a", 1, 2, 1, 1, std=1.0)
        make.norm(f"{layer}.self_attn_layer_norm", 16)
        make.linear(f"{layer}.fc1", 16, 20)
        make.linear(f"{layer}.fc2", 20, 16)
        make.norm(f"{layer}.final_layer_norm", 16)
    make.linear("predictor", 16, 5)
    return make.state


# ---- functions ------------------------------------------------------------------------------


def norm(s: State, name: str, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], s[f"{name}.weight"], s[f"{name}.bias"], eps)


def linear(s: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, s[f"{name}.weight"], s.get(f"{name}.bias"))


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def eva(s: State, pixels: Tensor, heads: int, depth: int, eps: float = 1e-6) -> Tensor:
    """(U, 3, H, W) -> (U, 1 + patches, D), before the norm."""
    patch = s["patch_embed.proj.weight"].shape[-1]
    x = F.conv2d(pixels, s["patch_embed.proj.weight"], s["patch_embed.proj.bias"], stride=patch)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([s["cls_token"].expand(len(x), -1, -1), x], 1) + s["pos_embed"]
    for number in range(depth):
        block = f"blocks.{number}"
        q, k, v = linear(s, f"{block}.attn.qkv", norm(s, f"{block}.norm1", x, eps)).chunk(3, -1)
        q, v = q + s[f"{block}.attn.q_bias"], v + s[f"{block}.attn.v_bias"]
        x = x + linear(s, f"{block}.attn.proj", attend(q, k, v, heads))
        hidden = F.gelu(linear(s, f"{block}.mlp.fc1", norm(s, f"{block}.norm2", x, eps)))
        x = x + linear(s, f"{block}.mlp.fc2", hidden)
    return x


def qformer(s: State, prefix: str, queries: str, seen: Tensor, heads: int) -> Tensor:
    """(U, N, D) -> (U, Q, D'); layers with cross-attention are those that have its tensors."""
    eps = 1e-12
    x = norm(s, f"{prefix}embeddings.LayerNorm", s[queries].expand(len(seen), -1, -1), eps)
    number = 0
    while f"{prefix}encoder.layer.{number}.attention.self.query.weight" in s:
        layer = f"{prefix}encoder.layer.{number}"
        for kind in ("attention", "crossattention"):
            if f"{layer}.{kind}.self.query.weight" not in s:
                continue
            source = x if kind == "attention" else seen
            names = [f"{layer}.{kind}.self.{part}" for part in ("query", "key", "value")]
            q, k, v = (
                linear(s, name, y) for name, y in zip(names, (x, source, source), strict=True)
            )
            out = linear(s, f"{layer}.{kind}.output.dense", attend(q, k, v, heads))
            x = norm(s, f"{layer}.{kind}.output.LayerNorm", out + x, eps)
        hidden = F.gelu(linear(s, f"{layer}.intermediate_query.dense", x))
        out = linear(s, f"{layer}.output_query.dense", hidden)
        x = norm(s, f"{layer}.output_query.LayerNorm", out + x, eps)
        number += 1
    return x


def imagebind(s: State, mel: Tensor, heads: int, stride: int) -> tuple[Tensor, Tensor]:
    """(U, 1, mels, frames) -> class token after the head's norm (U, D), embedding (U, D')."""
    stem, trunk, eps = "modality_preprocessors.audio", "modality_trunks.audio", 1e-6
    x = F.conv2d(mel, s[f"{stem}.rgbt_stem.proj.weight"], stride=stride).flatten(2).transpose(1, 2)
    x = norm(s, f"{stem}.rgbt_stem.norm_layer", x, 1e-5)
    x = torch.cat([s[f"{stem}.cls_token"].expand(len(x), -1, -1), x], 1)
    x = x + s[f"{stem}.pos_embedding_helper.pos_embed"]
    number = 0
    while f"{trunk}.blocks.{number}.norm_1.weight" in s:
        block = f"{trunk}.blocks.{number}"
        y = norm(s, f"{block}.norm_1", x, eps)
        weight, bias = s[f"{block}.attn.in_proj_weight"], s[f"{block}.attn.in_proj_bias"]
        q, k, v = F.linear(y, weight, bias).chunk(3, -1)
        k = torch.cat([k, s[f"{block}.attn.bias_k"].expand(len(x), -1, -1)], 1)
        v = torch.cat([v, s[f"{block}.attn.bias_v"].expand(len(x), -1, -1)], 1)
        x = x + linear(s, f"{block}.attn.out_proj", attend(q, k, v, heads))
        hidden = F.gelu(linear(s, f"{block}.mlp.fc1", norm(s, f"{block}.norm_2", x, eps)))
        x = x + linear(s, f"{block}.mlp.fc2", hidden)
        number += 1
    first = norm(s, "modality_heads.audio.0", x, eps)[:, 0]
    return first, 20 * F.normalize(linear(s, "modality_heads.audio.2", first), dim=-1)


def channel_norm(s: State, name: str, x: Tensor) -> Tensor:
    return norm(s, name, x.movedim(1, -1), 1e-5).movedim(-1, 1)


def reg_stage(s: State, stage: str, x: Tensor) -> Tensor:
    """Timm's RegStage with SiLU and norms over channels, (N, C, H, W)."""
    number = 1
    while f"{stage}.b{number}.conv1.conv.weight" in s:
        block = f"{stage}.b{number}"
        y = F.conv2d(x, s[f"{block}.conv1.conv.weight"])
        y = F.silu(channel_norm(s, f"{block}.conv1.bn", y))
        y = F.conv2d(y, s[f"{block}.conv2.conv.weight"], padding=1, groups=y.shape[1])
        y = F.silu(channel_norm(s, f"{block}.conv2.bn", y))
        weight = y.mean((2, 3), keepdim=True)
        weight = F.conv2d(weight, s[f"{block}.se.fc1.weight"], s[f"{block}.se.fc1.bias"])
        weight = F.conv2d(F.silu(weight), s[f"{block}.se.fc2.weight"], s[f"{block}.se.fc2.bias"])
        y = F.conv2d(y * weight.sigmoid(), s[f"{block}.conv3.conv.weight"])
        y = channel_norm(s, f"{block}.conv3.bn", y)
        if f"{block}.downsample.conv.weight" in s:
            x = F.conv2d(x, s[f"{block}.downsample.conv.weight"])
            x = channel_norm(s, f"{block}.downsample.bn", x)
        x = F.silu(y + x)
        number += 1
    return x


def stc(s: State, x: Tensor, padding: int) -> Tensor:
    """VideoLLaMA2's connector, (B, T, N, D) -> (B, N', D')."""
    prefix = "model.mm_projector"
    b, t, n, _ = x.shape
    side = round(n**0.5)
    x = x.flatten(0, 1).transpose(1, 2).unflatten(2, (side, side))
    x = reg_stage(s, f"{prefix}.s1", x).unflatten(0, (b, t)).transpose(1, 2)
    weight, bias = s[f"{prefix}.sampler.0.weight"], s[f"{prefix}.sampler.0.bias"]
    x = F.silu(F.conv3d(x, weight, bias, stride=weight.shape[2:], padding=padding))
    steps = x.shape[2]
    x = reg_stage(s, f"{prefix}.s2", x.transpose(1, 2).flatten(0, 1))
    x = x.flatten(2).transpose(1, 2).unflatten(0, (b, steps)).flatten(1, 2)
    return linear(s, f"{prefix}.readout.2", F.gelu(linear(s, f"{prefix}.readout.0", x)))
