"""Map every token by a multi-layer perceptron (LLaVA 1.5, arXiv 2310.03744)."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

from avllm.adapters.base import Prompt, StreamAdapter
from avllm.tokens import Tokens


class MLP(StreamAdapter):
    """Apply ``depth`` linear layers with GELU between them to every token.

    Args:
        stream: the stream to project.
        dim: width to project to; the LLM's width when not given.
        hidden: width between the layers; ``dim`` when not given.
        depth: number of linear layers, at least 1.
        norm: LayerNorm before the first layer.
    """

    def __init__(
        self,
        widths: dict[str, int],
        llm_dim: int,
        *,
        stream: str,
        dim: int | None = None,
        hidden: int | None = None,
        depth: int = 2,
        norm: bool = False,
    ) -> None:
        super().__init__(widths, llm_dim, stream)
        if depth < 1:
            raise ValueError(f"mlp on {stream!r} has depth {depth}; expected at least 1")
        dim = dim or llm_dim
        sizes = [self.in_dim, *[hidden or dim] * (depth - 1), dim]
        layers: list[nn.Module] = [nn.LayerNorm(self.in_dim)] if norm else []
        for number, (in_dim, out_dim) in enumerate(pairwise(sizes)):
            if number > 0:
                layers.append(nn.GELU())
            layers.append(nn.Linear(in_dim, out_dim))
        self.layers = nn.Sequential(*layers)
        self.set_out_dim(dim)

    def adapt(self, tokens: Tokens, prompt: Prompt | None = None) -> Tokens:
        return tokens.with_x(self.layers(tokens.x))  # (B, T, P, D_out)
