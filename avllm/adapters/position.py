"""Mark tokens with their time: learned positions by index, or sinusoids of their seconds."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from avllm.adapters.base import Prompt, StreamAdapter, sinusoids
from avllm.tokens import Tokens


class Position(StreamAdapter):
    """Add an embedding of time to every token of a step.

    Args:
        stream: the stream to mark.
        kind: ``learned``, one vector for each step index as in Video-LLaMA (arXiv 2306.02858,
            section 2.1), linearly interpolated where a clip has more steps than ``max_steps``; or
            ``seconds``, fixed sinusoids (arXiv 1706.03762, section 3.5) of the step's centre in
            seconds, then a trainable scale.
        max_steps: number of learned vectors.
        shortest, longest: periods in seconds of the fastest and the slowest sinusoid.
        scale: of the sinusoids at the start; it learns.
    """

    def __init__(
        self,
        widths: dict[str, int],
        llm_dim: int,
        *,
        stream: str,
        kind: str = "seconds",
        max_steps: int = 32,
        shortest: float = 0.25,
        longest: float = 10_000.0,
        scale: float = 0.1,
    ) -> None:
        super().__init__(widths, llm_dim, stream)
        if kind not in ("learned", "seconds"):
            raise ValueError(
                f"position on {stream!r} has kind {kind!r}; expected 'learned' or 'seconds'"
            )
        if max_steps < 1:
            raise ValueError(
                f"position on {stream!r} has max_steps {max_steps}; expected 1 or more"
            )
        if not 0 < shortest < longest:
            raise ValueError(
                f"position on {stream!r} has periods from {shortest} to {longest} s; "
                "expected 0 < shortest < longest"
            )
        self.kind = kind
        self.shortest = shortest
        self.longest = longest
        if kind == "learned":
            self.embedding = nn.Parameter(torch.empty(max_steps, self.in_dim).normal_(std=0.02))
        else:
            self.scale = nn.Parameter(torch.full((1,), scale))

    def adapt(self, tokens: Tokens, prompt: Prompt | None = None) -> Tokens:
        at = self._learned(tokens) if self.kind == "learned" else self._sinusoid(tokens.span)
        return tokens.with_x(tokens.x + at.to(tokens.x.dtype).unsqueeze(2))  # (B, T, P, D)

    def _learned(self, tokens: Tokens) -> Tensor:
        """Return the embedding of each step's index, ``(B, T, D)``.

        The positions of a clip with more steps than the table are scaled to fit into it.
        """
        table = self.embedding
        last = table.shape[0] - 1
        steps = tokens.mask.any(-1).sum(1)  # (B,)
        index = torch.arange(tokens.x.shape[1], device=table.device, dtype=torch.float32)  # (T,)
        squeeze = (last / (steps.float() - 1).clamp(min=1)).clamp(max=1.0)  # (B,)
        place = (index[None] * squeeze[:, None]).clamp(max=last)  # (B, T)
        low = place.floor().long()
        share = (place - low).unsqueeze(-1).to(table.dtype)
        return table[low] * (1 - share) + table[(low + 1).clamp(max=last)] * share  # (B, T, D)

    def _sinusoid(self, span: Tensor) -> Tensor:
        """Return the sinusoids of each step's centre in seconds, ``(B, T, D)``."""
        return self.scale * sinusoids(span.mean(-1), self.in_dim, self.shortest, self.longest)
