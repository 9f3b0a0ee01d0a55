"""Gather what several layers of one encoder know: GAMA's aggregator (arXiv 2406.11768, 3.1)."""

from __future__ import annotations

from torch import nn

from avllm.adapters._attention import AttentionBlock
from avllm.adapters._cut import UnitCut
from avllm.adapters.base import Adapter, Prompt
from avllm.tokens import Grid, Tokens


class LayerAggregator(Adapter):
    """Let the tokens of a stream attend to those of other layers of its encoder, one after another.

    The encoder gives its layers as streams (``layers: [4, 8, -1]`` makes ``audio.4``,
    ``audio.8`` and ``audio``); ``branch`` keeps copies of them for another adapter, such as
    GAMA's Q-Former over the last one.

    Args:
        stream: the stream that goes on; its clock and number of tokens stay.
        layers: the streams that it reads, in this order, which are consumed. None: it attends to
            itself once.
        per: what a token sees: ``frame`` (its own step) or ``clip`` (all steps).
        heads: of the attention.
    """

    def __init__(
        self,
        widths: dict[str, int],
        llm_dim: int,
        *,
        stream: str,
        layers: list[str] | None = None,
        per: str = "clip",
        heads: int = 8,
    ) -> None:
        super().__init__(widths, llm_dim)
        self.stream = stream
        self.layers = list(layers or [])
        if stream in self.layers:
            raise ValueError(
                f"layer_aggregator has layers {self.layers}, among them its own stream "
                f"{stream!r}; expected other layers (none: it attends to itself)"
            )
        if per == "window":
            raise ValueError(
                f"layer_aggregator on {stream!r} has per 'window'; expected 'frame' or 'clip'"
            )
        self.cut = UnitCut(f"layer_aggregator on {stream!r}", per)
        dim = self.require(stream)
        read = [self.require(layer) for layer in self.layers] or [dim]
        self.blocks = nn.ModuleList(AttentionBlock(dim, heads, width) for width in read)
        for layer in self.layers:
            self.out_widths.pop(layer)

    def forward(
        self, streams: dict[str, Tokens], prompt: Prompt | None = None
    ) -> dict[str, Tokens]:
        if self.stream not in streams:
            return streams
        own = streams[self.stream]
        x = self.cut.of(own)[0].flatten(0, 1)  # (B * G, M, D)
        for layer, block in zip(self.layers or [self.stream], self.blocks, strict=True):
            keys, keep, _ = self.cut.of(streams[layer])
            x = block(x, keys.flatten(0, 1), keep.flatten(0, 1))
        others = {name: t for name, t in streams.items() if name not in self.layers}
        return {**others, self.stream: own.with_x(x.reshape(*own.x.shape))}

    def output_grid(self, grids: dict[str, Grid]) -> dict[str, Grid]:
        if self.stream not in grids:
            return grids
        return {name: grid for name, grid in grids.items() if name not in self.layers}
