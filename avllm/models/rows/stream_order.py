"""Order the streams of a clip in the LLM's sequence, from clocks and masks alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from avllm.adapters.base import in_variant
from avllm.errors import UserError
from avllm.layouts.base import Layout
from avllm.models.configuration_avllm import AVConfig
from avllm.models.connector import Connector
from avllm.tokens import EncoderInput, Grid

MOST_ORDERS = 512  # orders that are remembered: many questions ask about one clip


def check_layout(config: AVConfig, connector: Connector) -> None:
    """Refuse a layout of streams that the connector does not give.

    Raises:
        UserError: names the stream, and those that exist.
    """
    for stream in config.layout.get("streams") or []:
        if stream not in connector.out_streams:
            raise UserError(
                f"layout: stream {stream!r} does not come out of the connector; choose among "
                f"{connector.out_streams}"
            )


class StreamOrder:
    """Compute the stream of each token that a clip becomes in the LLM's sequence.

    Args:
        connector: on the meta device; it counts tokens.
        layout: orders the streams.
        names: the streams that the encoders give, in the model's order.
        fused: streams that a fusion consumes, which are not in the sequence.
    """

    def __init__(
        self, connector: Connector, layout: Layout, names: Iterable[str], fused: Sequence[str]
    ) -> None:
        self.connector = connector
        self.layout = layout
        self.names = list(names)
        self.fused = fused
        self._orders: dict[tuple[Any, ...], list[str]] = {}

    def of(self, clip: Mapping[str, EncoderInput], variant: str | None) -> list[str]:
        """Return the name of the stream of each token, in order.

        Args:
            clip: inputs by stream.
            variant: the variant in which the connector runs.
        """
        # In the order of the model's streams, not the clip's: cached features make the same row.
        grids: dict[str, Grid] = {}
        for name in self.names:
            stream = name.split(".")[0]
            if stream in clip:
                grids[name] = clip[stream].grid
        if not grids:
            return []
        key = (variant, *(_clock(name, grid) for name, grid in grids.items()))
        if key not in self._orders:
            if len(self._orders) >= MOST_ORDERS:
                self._orders.clear()
            self._orders[key] = self._compute(grids, variant)
        return self._orders[key]

    def _compute(self, grids: dict[str, Grid], variant: str | None) -> list[str]:
        with in_variant(variant):
            connected = self.connector.output_grid(grids)
        in_sequence = {name: grid for name, grid in connected.items() if name not in self.fused}
        return self.layout.order(in_sequence)


def _clock(name: str, grid: Grid) -> tuple[Any, ...]:
    """Return what decides a stream's tokens, in a form that can be a key."""
    return name, grid.mask.shape, grid.span.numpy().tobytes(), grid.mask.numpy().tobytes()
