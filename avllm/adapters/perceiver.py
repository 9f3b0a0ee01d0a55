"""Read a stream with latent queries: Flamingo's perceiver resampler (arXiv 2204.14198, 3.1.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from avllm.adapters._attention import AttentionBlock
from avllm.adapters._cut import UnitCut
from avllm.adapters.base import Prompt, StreamAdapter
from avllm.tokens import Grid, Tokens


class Perceiver(StreamAdapter):
    """Read frames, windows or clips with a fixed number of learned queries.

    Unlike a Q-Former's, the queries have no separate self-attention: in each layer they attend
    to the media and to themselves at once (Flamingo, appendix A.1.1). BLIP-3-Video (arXiv
    2410.16267) reads each frame so, Flamingo all frames together: put ``position`` before it there.

    Args:
        stream: the stream to read.
        num_queries: tokens that a frame, window or clip becomes.
        per: ``frame``, ``window`` (needs ``seconds``) or ``clip``.
        seconds: length and distance of the windows.
        dim: width of the queries and of the result; None: the stream's.
        layers, heads: of the attention.
    """

    def __init__(
        self,
        widths: dict[str, int],
        llm_dim: int,
        *,
        stream: str,
        num_queries: int = 64,
        per: str = "clip",
        seconds: float | None = None,
        dim: int | None = None,
        layers: int = 6,
        heads: int = 8,
    ) -> None:
        super().__init__(widths, llm_dim, stream)
        if num_queries < 1 or layers < 1:
            raise ValueError(
                f"perceiver on {stream!r} has num_queries {num_queries} and layers {layers}; "
                "expected 1 or more of each"
            )
        self.cut = UnitCut(f"perceiver on {stream!r}", per, seconds)
        dim = dim or self.in_dim
        self.enter = nn.Linear(self.in_dim, dim) if dim != self.in_dim else nn.Identity()
        self.queries = nn.Parameter(torch.empty(num_queries, dim).normal_(std=0.02))
        self.blocks = nn.ModuleList(AttentionBlock(dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.set_out_dim(dim)

    def adapt(self, tokens: Tokens, prompt: Prompt | None = None) -> Tokens:
        media, keep, span = self.cut.of(tokens)  # (B, G, M, D), (B, G, M), (B, G, 2)
        b, g = keep.shape[:2]
        media = self.enter(media.flatten(0, 1))  # (B * G, M, D')
        keep = keep.flatten(0, 1)  # (B * G, M)
        queries = self.queries.expand(b * g, -1, -1)
        own = keep.new_ones(b * g, queries.shape[1])
        for block in self.blocks:
            keys = torch.cat([media, queries], 1)  # (B * G, M + Q, D')
            queries = block(queries, keys, torch.cat([keep, own], 1))
        read: Tensor = self.norm(queries).unflatten(0, (b, g))  # (B, G, Q, D')
        real = keep.any(-1).view(b, g, 1).expand(-1, -1, read.shape[2])
        return Tokens(read, real, span)

    def grid(self, grid: Grid) -> Grid:
        return self.cut.grid(grid, len(self.queries))
