"""Project every token by one linear layer.

It is the last step of MiniGPT-4 (arXiv 2304.10592) and of Video-LLaMA (arXiv 2306.02858), and the
whole connector of LLaVA 1.0 (arXiv 2304.08485).
"""

from __future__ import annotations

from torch import nn

from avllm.adapters.base import Prompt, StreamAdapter
from avllm.tokens import Tokens


class Linear(StreamAdapter):
    """Map every token x to ``x W + b``.

    Args:
        stream: the stream to project.
        dim: width to project to; the LLM's width when not given.
        norm: LayerNorm before the projection (Q-Former outputs need none).
    """

    def __init__(
        self,
        widths: dict[str, int],
        llm_dim: int,
        *,
        stream: str,
        dim: int | None = None,
        norm: bool = False,
    ) -> None:
        super().__init__(widths, llm_dim, stream)
        self.norm = nn.LayerNorm(self.in_dim) if norm else nn.Identity()
        self.proj = nn.Linear(self.in_dim, dim or llm_dim)
        self.set_out_dim(dim or llm_dim)

    def adapt(self, tokens: Tokens, prompt: Prompt | None = None) -> Tokens:
        return tokens.with_x(self.proj(self.norm(tokens.x)))  # (B, T, P, D_out)
