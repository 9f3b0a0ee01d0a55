"""Write soft prompts out of a clip's segments: the prompt generator of TSADP (arXiv 2412.11391)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from avllm.adapters._attention import AttentionBlock
from avllm.adapters.base import Adapter, Prompt, masked_mean, sinusoids, time_windows, whole_span
from avllm.tokens import Grid, Tokens


class DynamicPrompt(Adapter):
    """Make a few tokens about what happens when, beside the stream that they are made of.

    The stream is averaged over segments of time, each marked with its second; learned queries
    attend to the segments, and their results are the prompt. The paper leaves the form of its
    generator open; this is the simplest that depends on content and order.

    Args:
        stream: the stream to read; it goes on unchanged.
        to: name of the prompt's stream. Place it before the others with the layout ``concat``.
        num_tokens: tokens of the prompt.
        seconds: length of a segment.
        dim: width of the prompt; None: the LLM's.
        layers, heads: of the attention.
    """

    def __init__(
        self,
        widths: dict[str, int],
        llm_dim: int,
        *,
        stream: str,
        to: str = "video_prompt",
        num_tokens: int = 8,
        seconds: float = 1.0,
        dim: int | None = None,
        layers: int = 2,
        heads: int = 8,
    ) -> None:
        super().__init__(widths, llm_dim)
        if to in widths:
            raise ValueError(
                f"dynamic_prompt has to {to!r}, a stream that exists already; expected a new name"
            )
        if num_tokens < 1 or layers < 1 or seconds <= 0:
            raise ValueError(
                f"dynamic_prompt on {stream!r} has num_tokens {num_tokens}, layers {layers} and "
                f"seconds {seconds}; expected 1 or more, and more than 0 seconds"
            )
        self.stream = stream
        self.made = to  # not `self.to`, a method of torch's
        self.seconds = seconds
        dim = dim or llm_dim
        self.enter = nn.Linear(self.require(stream), dim)
        self.queries = nn.Parameter(torch.empty(num_tokens, dim).normal_(std=0.02))
        self.blocks = nn.ModuleList(AttentionBlock(dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.out_widths[to] = dim

    def forward(
        self, streams: dict[str, Tokens], prompt: Prompt | None = None
    ) -> dict[str, Tokens]:
        if self.stream not in streams:
            return streams
        tokens = streams[self.stream]
        segments, real = self.segments(tokens)  # (B, W, D'), (B, W)
        x = self.queries.expand(len(segments), -1, -1)
        for block in self.blocks:
            x = block(x, segments, real)
        there = tokens.present()
        mask = there[:, None, None].expand(-1, 1, x.shape[1])
        span = whole_span(tokens.span, tokens.mask.any(-1))
        return {**streams, self.made: Tokens(self.norm(x).unsqueeze(1), mask, span)}

    def output_grid(self, grids: dict[str, Grid]) -> dict[str, Grid]:
        if self.stream not in grids:
            return grids
        grid = grids[self.stream]
        span = whole_span(grid.span[None], grid.mask.any(-1)[None])[0]
        mask = grid.mask.any()[None, None].expand(1, len(self.queries))
        return {**grids, self.made: Grid(span, mask)}

    def segments(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Return the mean of each segment of time with its second: ``(B, W, D')``, ``(B, W)``."""
        steps = masked_mean(tokens.x, tokens.mask, 2)  # (B, T, D)
        windows = time_windows(tokens.span, tokens.mask.any(-1), self.seconds)
        clips = torch.arange(len(steps), device=steps.device)[:, None, None]
        mean = masked_mean(steps[clips, windows.index], windows.mask, 2)  # (B, W, D)
        x = self.enter(mean)
        when = sinusoids(windows.span.mean(-1), x.shape[-1], self.seconds, 10_000.0)
        return x + when.to(x.dtype), windows.mask.any(-1)
