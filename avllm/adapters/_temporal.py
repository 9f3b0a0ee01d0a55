"""Turn the tokens of all steps into a fixed number of tokens: ways of BLIP-3-Video's encoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from avllm.adapters._attention import AttentionBlock


class TokenLearner(nn.Module):
    """Make n tokens as n weighted averages, whose weights each token decides (arXiv 2106.11297).

    Args:
        dim: width of the tokens.
        number: n.
    """

    def __init__(self, dim: int, number: int) -> None:
        super().__init__()
        self.scores = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, number, bias=False)
        )

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """Average ``x (B, N, D)`` where ``real (B, N)``: ``(B, n, D)``, zero where nothing is."""
        scores = self.scores(x)  # (B, N, n)
        any_real = real.any(1)[:, None, None]  # (B, 1, 1)
        scores = scores.masked_fill((~real)[..., None] & any_real, -torch.inf)
        weights = scores.softmax(1) * any_real.to(x.dtype)
        return weights.transpose(1, 2) @ torch.where(real[..., None], x, 0.0)


class TokenTuringMachine(nn.Module):
    """Read the steps one after the other with a memory of tokens (arXiv 2211.09119).

    At each step it reads a few tokens of memory and input together, processes them, and writes a
    new memory out of memory, output and input; all choices are made by :class:`TokenLearner`.

    Args:
        dim, heads: of the tokens and of the processing block.
        memory: tokens of the memory.
        read: tokens that are read and processed a step.
        number: tokens of the result, read from the memory at the end.
    """

    def __init__(self, dim: int, heads: int, *, memory: int, read: int, number: int) -> None:
        super().__init__()
        self.begin = nn.Parameter(torch.empty(memory, dim).normal_(std=0.02))
        # Which of the three a token comes from: memory, output or input.
        self.origin = nn.Parameter(torch.empty(3, dim).normal_(std=0.02))
        self.read = TokenLearner(dim, read)
        self.process = AttentionBlock(dim, heads)
        self.write = TokenLearner(dim, memory)
        self.finish = TokenLearner(dim, number)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """Read steps ``x (B, T, P, D)`` in order, ``real (B, T, P)`` bool: ``(B, n, D)``."""
        memory = self.begin.expand(len(x), -1, -1)  # (B, M, D)
        kept = real.new_ones(memory.shape[:2])  # (B, M)
        for step in range(x.shape[1]):
            here = real[:, step]  # (B, P)
            seen = torch.cat([memory + self.origin[0], x[:, step] + self.origin[2]], 1)
            read = self.read(seen, torch.cat([kept, here], 1))  # (B, R, D)
            done = self.process(read, read, real.new_ones(read.shape[:2]))
            known = [memory + self.origin[0], done + self.origin[1], x[:, step] + self.origin[2]]
            filled = [kept, real.new_ones(done.shape[:2]), here]
            written = self.write(torch.cat(known, 1), torch.cat(filled, 1))
            # A step that a clip does not have leaves its memory as it was.
            memory = torch.where(here.any(1)[:, None, None], written, memory)
        result: Tensor = self.finish(memory, kept)
        return result
