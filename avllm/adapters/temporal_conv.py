"""Convolve steps over time: speed, turning points and onsets are differences of near steps.

They are lost once steps are pooled, so this adapter comes first.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from avllm.adapters.base import Prompt, StreamAdapter
from avllm.tokens import Tokens


class ConvBlock(nn.Module):
    """Compute ``x + W gelu(conv(norm(x)))`` over time; masked steps are zero to the convolution."""

    def __init__(self, dim: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.conv = nn.Conv1d(dim, dim, kernel, dilation=dilation, padding=dilation * (kernel // 2))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        """Mix steps ``x (M, T, D)``, where ``keep (M, T, 1)`` is 1 for real ones: ``(M, T, D)``."""
        mixed = self.conv((self.norm(x) * keep).transpose(1, 2)).transpose(1, 2)  # (M, T, D)
        return x + self.proj(nn.functional.gelu(mixed))


def deltas(tokens: Tokens, noise: float = 0.1) -> Tensor:
    """Return the step after minus the step before, ``(B, T, P, D)``; zero unless both are real.

    Changes are brought to about unit size, but those below ``noise`` times the spread of a step's
    features stay small.
    """
    x, mask = tokens.x, tokens.mask
    if x.shape[1] < 3:
        return torch.zeros_like(x)
    real = (mask[:, 2:] & mask[:, 1:-1] & mask[:, :-2]).unsqueeze(-1)  # (B, T - 2, P, 1)
    change = (x[:, 2:] - x[:, :-2]) * real  # (B, T - 2, P, D)
    variance = change.var(-1, keepdim=True) + x[:, 1:-1].var(-1, keepdim=True) * noise**2
    return nn.functional.pad(change * (variance + 1e-8).rsqrt(), (0, 0, 0, 0, 1, 1))


class TemporalConv(StreamAdapter):
    """Apply residual 1-D convolutions over the steps, each place of a step by itself.

    Clock and token count do not change.
    Steps are neighbours by their order, so that they should be evenly spaced. The residual blocks
    are those of ResNet (arXiv 1512.03385) with dilation as in WaveNet (arXiv 1609.03499).

    Args:
        stream: the stream to mix.
        dim: width inside and out; None keeps the stream's.
        layers: number of blocks.
        kernel: steps that a block sees, odd.
        growth: each block's dilation is the one before times this; 2 sees far with few blocks.
        deltas: concatenate to each step the difference of its two neighbours, as speech recognition
            does (Furui 1986), scaled to unit size: slow motion is small compared with what does not
            move, and would be learned late.
    """

    def __init__(
        self,
        widths: dict[str, int],
        llm_dim: int,
        *,
        stream: str,
        dim: int | None = None,
        layers: int = 2,
        kernel: int = 5,
        growth: int = 1,
        deltas: bool = False,
    ) -> None:
        super().__init__(widths, llm_dim, stream)
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(
                f"temporal_conv on {stream!r} has kernel {kernel}; expected an odd number"
            )
        if layers < 1 or growth < 1:
            raise ValueError(
                f"temporal_conv on {stream!r} has layers {layers} and growth {growth}; "
                "expected 1 or more of each"
            )
        dim = dim or self.in_dim
        width = self.in_dim * (2 if deltas else 1)
        self.deltas = deltas
        self.enter = nn.Linear(width, dim) if dim != width else nn.Identity()
        self.blocks = nn.ModuleList(ConvBlock(dim, kernel, growth**i) for i in range(layers))
        self.set_out_dim(dim)

    def adapt(self, tokens: Tokens, prompt: Prompt | None = None) -> Tokens:
        x = torch.cat([tokens.x, deltas(tokens)], -1) if self.deltas else tokens.x
        x = self.enter(x).transpose(1, 2)  # (B, P, T, D)
        keep = tokens.mask.transpose(1, 2).unsqueeze(-1).to(x.dtype)  # (B, P, T, 1)
        b, p, t, d = x.shape
        x = x.reshape(b * p, t, d)
        keep = keep.reshape(b * p, t, 1)
        for block in self.blocks:
            x = block(x, keep)
        return tokens.with_x(x.reshape(b, p, t, d).transpose(1, 2))  # (B, T, P, D)
