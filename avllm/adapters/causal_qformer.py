"""Read windows of time with a Q-Former that knows what came before: FAVOR (arXiv 2310.05863)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from avllm.adapters._attention import Attention
from avllm.adapters.base import Prompt
from avllm.adapters.qformer import QFormer
from avllm.tokens import Tokens


class CausalQFormer(QFormer):
    """Let each step read the steps up to it, then read windows of steps with learned queries.

    FAVOR, section 3.2: a self-attention over all steps of the clip, whose mask is a triangle of
    blocks (the tokens of one step see each other and all before), is added to the stream; the
    Q-Former reads the sum, window by window. FAVOR puts it after ``sync_concat`` with
    ``tokens: keep``, and trains it with the objective ``query_diversity``.

    Args:
        stream: the stream to read, such as ``sync_concat``'s ``av``.
        num_queries: tokens that each window becomes.
        seconds: length and distance of the windows.
        dim, layers, heads, intermediate, cross_every, dropout: of the Q-Former.
        causal_dim, causal_heads: width and heads of the self-attention over steps.
    """

    def __init__(
        self,
        widths: dict[str, int],
        llm_dim: int,
        *,
        stream: str,
        num_queries: int = 32,
        seconds: float = 10.0,
        dim: int = 768,
        layers: int = 2,
        heads: int = 12,
        intermediate: int | None = None,
        cross_every: int = 1,
        dropout: float = 0.0,
        causal_dim: int = 768,
        causal_heads: int = 12,
    ) -> None:
        super().__init__(
            widths,
            llm_dim,
            stream=stream,
            num_queries=num_queries,
            per="window",
            seconds=seconds,
            dim=dim,
            layers=layers,
            heads=heads,
            intermediate=intermediate,
            cross_every=cross_every,
            dropout=dropout,
        )
        self.enter = nn.Linear(self.in_dim, causal_dim)
        self.causal = Attention(causal_dim, causal_heads)
        self.leave = nn.Linear(causal_dim, self.in_dim)

    def adapt(self, tokens: Tokens, prompt: Prompt | None = None) -> Tokens:
        return super().adapt(tokens.with_x(self.with_past(tokens)), prompt)

    def with_past(self, tokens: Tokens) -> Tensor:
        """Add to each step what it reads of itself and of the steps before, ``(B, T, P, D)``."""
        b, t, p, _ = tokens.x.shape
        x = self.enter(tokens.x).flatten(1, 2)  # (B, T * P, D')
        step = torch.arange(t * p, device=x.device) // p  # (T * P,)
        not_later = step[None] <= step[:, None]  # (T * P, T * P)
        seen = not_later & tokens.mask.flatten(1)[:, None]  # (B, T * P, T * P)
        past: Tensor = self.leave(self.causal(x, x, seen))
        return tokens.x + past.view(b, t, p, -1)
