"""Pass all streams through one small transformer: OneEncoder (arXiv 2409.11059, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from avllm.adapters._attention import AttentionBlock
from avllm.adapters._cut import UnitCut
from avllm.adapters.base import Adapter, Prompt
from avllm.tokens import Grid, Tokens


class UniversalProjection(Adapter):
    """Project streams by one transformer, which a token for each modality tells apart.

    A stream enters by its own linear layer (the alignment layer); the transformer is the same for
    all. To add a modality later, list its stream and freeze the rest: ``trainable`` names
    ``enter.<stream>`` and ``modality.<stream>`` alone.

    Args:
        streams: the streams to project.
        dim: width inside and out; None: the LLM's.
        layers, heads: of the transformer.
        per: what a token sees: ``frame`` (its own step) or ``clip`` (all steps).
        modality_token: put the learned token of its modality before each frame or clip; it is read
            and then left out.
    """

    def __init__(
        self,
        widths: dict[str, int],
        llm_dim: int,
        *,
        streams: list[str],
        dim: int | None = None,
        layers: int = 4,
        heads: int = 8,
        per: str = "clip",
        modality_token: bool = True,
    ) -> None:
        super().__init__(widths, llm_dim)
        if not streams or layers < 1:
            raise ValueError(
                f"universal_projection has streams {streams} and layers {layers}; "
                "expected one or more of each"
            )
        if per == "window":
            raise ValueError("universal_projection has per 'window'; expected 'frame' or 'clip'")
        self.streams = list(streams)
        self.cut = UnitCut("universal_projection", per)
        dim = dim or llm_dim
        self.enter = nn.ModuleDict()
        self.modality = nn.ParameterDict()
        for stream in self.streams:
            key = stream.replace(".", "_")  # torch takes no dots in names
            self.enter[key] = nn.Linear(self.require(stream), dim)
            if modality_token:
                self.modality[key] = nn.Parameter(torch.empty(1, dim).normal_(std=0.02))
            self.out_widths[stream] = dim
        self.blocks = nn.ModuleList(AttentionBlock(dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)

    def forward(
        self, streams: dict[str, Tokens], prompt: Prompt | None = None
    ) -> dict[str, Tokens]:
        made = dict(streams)
        for stream in self.streams:
            if stream in streams:
                made[stream] = self._project(stream, streams[stream])
        return made

    def output_grid(self, grids: dict[str, Grid]) -> dict[str, Grid]:
        return grids

    def _project(self, stream: str, tokens: Tokens) -> Tokens:
        """Pass one stream through its own layer and the transformer: ``(B, T, P, D')``."""
        key = stream.replace(".", "_")
        entered = tokens.with_x(self.enter[key](tokens.x))
        x, real, _ = self.cut.of(entered)
        x, real = x.flatten(0, 1), real.flatten(0, 1)  # (B * G, M, D'), (B * G, M)
        if self.modality:
            token: Tensor = self.modality[key]
            x = torch.cat([token.expand(len(x), -1, -1), x], 1)  # (B * G, 1 + M, D')
            real = torch.cat([real.any(1, keepdim=True), real], 1)
        for block in self.blocks:
            x = block(x, x, real)
        if self.modality:
            x = x[:, 1:]
        return tokens.with_x(self.norm(x).reshape(entered.x.shape))
