"""Define the audio transformer of BEATs: relative positions, gated by the query, and DeepNorm."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput


class BeatsConfig(PretrainedConfig):
    """Shape of a :class:`BeatsModel`; the defaults are those of the published models.

    Args:
        embedding_size: width of the patches before they are projected to ``hidden_size``.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: of the transformer.
        patch_size: side of a patch, in frames and bands.
        stem_bias: True if the patches' convolution has a bias.
        num_mel_bins: of the spectrogram.
        conv_pos, conv_pos_groups: kernel (in tokens) and groups of the positional convolution.
        num_buckets, max_distance: of the relative positions, in tokens.
        layer_norm_eps: of all norms.
    """

    model_type = "beats"

    def __init__(
        self,
        embedding_size: int = 512,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        patch_size: int = 16,
        stem_bias: bool = False,
        num_mel_bins: int = 128,
        conv_pos: int = 128,
        conv_pos_groups: int = 16,
        num_buckets: int = 320,
        max_distance: int = 800,
        layer_norm_eps: float = 1e-5,
        **kwargs: Any,
    ) -> None:
        self.embedding_size = embedding_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.patch_size = patch_size
        self.stem_bias = stem_bias
        self.num_mel_bins = num_mel_bins
        self.conv_pos = conv_pos
        self.conv_pos_groups = conv_pos_groups
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.layer_norm_eps = layer_norm_eps
        super().__init__(**kwargs)


def distance_buckets(tokens: int, buckets: int, farthest: int) -> Tensor:
    """Return the bucket of each pair of tokens, ``(N, N)``: [query, key].

    Half of the buckets is for keys before the query, half for those after it. Of each half, the
    first half has a bucket for each distance; the rest grow with the logarithm of the distance up
    to ``farthest``, and the last holds all beyond.
    """
    place = torch.arange(tokens)
    relative = place[None] - place[:, None]  # (N, N), above 0 where the key is after the query
    per_side = buckets // 2
    exact = per_side // 2
    distance = relative.abs()
    share = torch.log(distance.clamp(min=1).float() / exact) / math.log(farthest / exact)
    far = (exact + (share * (per_side - exact)).long()).clamp(max=per_side - 1)
    near_or_far = torch.where(distance < exact, distance, far)
    return near_or_far + per_side * (relative > 0)


class BeatsBlock(nn.Module):
    """A transformer block with norms after attention and MLP.

    The residual is scaled up (DeepNorm, arXiv:2203.00555). What attention adds for the distance of
    two tokens is gated by the query.
    """

    def __init__(self, config: BeatsConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.residual_scale = (2 * config.num_hidden_layers) ** 0.25
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.grep_linear = nn.Linear(width // self.heads, 8)
        self.grep_a = nn.Parameter(torch.ones(1, self.heads, 1, 1))
        self.attn_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(width, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, width)
        self.mlp_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, bias: Tensor, hidden: Tensor) -> Tensor:
        """Map ``(U, N, D)`` to ``(U, N, D)``.

        Args:
            x: tokens.
            bias: of the distances, ``(H, N, N)``.
            hidden: ``(U, 1, 1, N)``, -inf at padding, else 0.
        """
        q, k, v = (self.split(linear(x)) for linear in (self.q_proj, self.k_proj, self.v_proj))
        gated = self.gate(q) * bias  # (U, H, N, N)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=(gated + hidden).to(q.dtype))
        attended = self.out_proj(attended.transpose(1, 2).flatten(2))  # (U, N, D)
        x = self.attn_norm(x * self.residual_scale + attended)
        mlp = self.fc2(F.gelu(self.fc1(x)))
        return self.mlp_norm(x * self.residual_scale + mlp)

    def split(self, x: Tensor) -> Tensor:
        """Separate the heads: ``(U, N, D)`` -> ``(U, H, N, D / H)``."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def gate(self, q: Tensor) -> Tensor:
        """Return the factor of the distances' bias: ``(U, H, N, D / H)`` -> ``(U, H, N, 1)``."""
        sums = self.grep_linear(q).unflatten(3, (2, 4)).sum(-1)  # (U, H, N, 2)
        update, reset = torch.sigmoid(sums).chunk(2, dim=-1)
        return update * (reset * self.grep_a - 1.0) + 2.0


class BeatsModel(PreTrainedModel):
    """The audio transformer of BEATs (Chen et al. 2022, arXiv:2212.09058)."""

    config_class = BeatsConfig
    base_model_prefix = "beats"
    main_input_name = "input_values"

    def __init__(self, config: BeatsConfig) -> None:
        super().__init__(config)
        inner = config.embedding_size
        width = config.hidden_size
        eps = config.layer_norm_eps
        side = config.patch_size
        self.stem = nn.Conv2d(1, inner, side, stride=side, bias=config.stem_bias)
        self.stem_norm = nn.LayerNorm(inner, eps=eps)
        self.projection = nn.Linear(inner, width) if inner != width else nn.Identity()
        kernel = config.conv_pos
        conv = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=config.conv_pos_groups)
        self.positions = weight_norm(conv, dim=2)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.distances = nn.Embedding(config.num_buckets, config.num_attention_heads)
        blocks = [BeatsBlock(config) for _ in range(config.num_hidden_layers)]
        self.blocks = nn.ModuleList(blocks)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Keep torch's initialisation."""

    def forward(
        self, input_values: Tensor, step_mask: Tensor, output_hidden_states: bool = False
    ) -> BaseModelOutput:
        """Encode spectrograms ``(U, frames, mels)``.

        Args:
            input_values: the spectrograms.
            step_mask: ``(U, S)``, not 0 at real steps of ``patch_size`` frames.
            output_hidden_states: give the embedding and each block's output, too.

        Returns:
            ``last_hidden_state (U, S * bands, D)``, the bands of a step one after the other.
        """
        maps = self.stem(input_values[:, None])  # (U, C, S, bands)
        real = step_mask.bool().repeat_interleave(maps.shape[3], 1)  # (U, N)
        x = self.projection(self.stem_norm(maps.flatten(2).transpose(1, 2)))  # (U, N, D)
        x = x * real[..., None]
        around = self.positions(x.transpose(1, 2))[..., : x.shape[1]]  # (U, D, N)
        x = self.norm(x + F.gelu(around).transpose(1, 2))
        config = self.config
        buckets = distance_buckets(x.shape[1], config.num_buckets, config.max_distance)
        bias = self.distances(buckets.to(x.device)).permute(2, 0, 1)  # (H, N, N)
        hidden = torch.zeros_like(real, dtype=x.dtype).masked_fill(~real, -math.inf)
        states = [x]
        for block in self.blocks:
            x = block(x, bias, hidden[:, None, None])
            states.append(x)
        hidden_states = tuple(states) if output_hidden_states else None
        return BaseModelOutput(last_hidden_state=x, hidden_states=hidden_states)


AutoConfig.register(BeatsConfig.model_type, BeatsConfig, exist_ok=True)
