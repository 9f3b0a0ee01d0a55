"""Copy a stream to another name, for adapters that read it in a second way."""

from __future__ import annotations

from avllm.adapters.base import Adapter, Prompt
from avllm.tokens import Grid, Tokens


class Branch(Adapter):
    """Copy a stream, once or several times; a later ``join`` or a fusion may consume the copies.

    Args:
        stream: the stream to copy.
        to: name of the copy, for example ``video.grid``, or of several. One without a dot reaches
            the LLM as a stream under its own placeholder.
    """

    def __init__(
        self, widths: dict[str, int], llm_dim: int, *, stream: str, to: str | list[str]
    ) -> None:
        super().__init__(widths, llm_dim)
        self.stream = stream
        self.copies = [to] if isinstance(to, str) else list(to)  # `to` is torch's
        for name in self.copies:
            if name in self.out_widths:
                raise ValueError(
                    f"branch has to {name!r}, a stream that exists already; expected a new name"
                )
            self.out_widths[name] = self.require(stream)

    def forward(
        self, streams: dict[str, Tokens], prompt: Prompt | None = None
    ) -> dict[str, Tokens]:
        """Add the copies; return the streams unchanged where this one is absent."""
        if self.stream not in streams:
            return streams
        return {**streams, **dict.fromkeys(self.copies, streams[self.stream])}

    def output_grid(self, grids: dict[str, Grid]) -> dict[str, Grid]:
        """Add the copies' grids."""
        if self.stream not in grids:
            return grids
        return {**grids, **dict.fromkeys(self.copies, grids[self.stream])}
