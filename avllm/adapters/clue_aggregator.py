"""Gather the clues that a question asks for from sight and sound: CAT (arXiv 2403.04640, 3.1)."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from avllm.adapters._attention import Attention
from avllm.adapters.base import Adapter, Prompt
from avllm.adapters.qformer import QFormer
from avllm.tokens import Grid, Tokens


class ClueAggregator(Adapter):
    """Let the question read each stream, let the streams read the question, then query each.

    The question's tokens, as the LLM embeds them, attend to all streams; each stream's tokens
    attend to what came of them; a Q-Former a stream reads the result with learned queries. CAT
    places global tokens after these clues: copy the streams with ``branch`` before it, average the
    copies with ``temporal_pool``, and order them in the layout ``concat``.

    Args:
        streams: the streams that become clues, one span of the clip's whole length each.
        num_queries: tokens that each stream becomes.
        dim: width of the attention, the Q-Formers and the result.
        layers, heads: of the Q-Formers; the heads are the attention's, too.
    """

    conditioned = True

    def __init__(
        self,
        widths: dict[str, int],
        llm_dim: int,
        *,
        streams: list[str],
        num_queries: int = 32,
        dim: int = 768,
        layers: int = 2,
        heads: int = 12,
    ) -> None:
        super().__init__(widths, llm_dim)
        if not streams:
            raise ValueError("clue_aggregator has streams []; expected at least one")
        self.streams = list(streams)
        self.words = nn.Sequential(nn.LayerNorm(llm_dim), nn.Linear(llm_dim, dim))
        self.enter = nn.ModuleDict()
        self.itself = nn.ModuleDict()
        self.asks = nn.ModuleDict()
        self.answers = nn.ModuleDict()
        self.readers = nn.ModuleDict()
        for stream in self.streams:
            key = _key(stream)
            self.enter[key] = nn.Linear(self.require(stream), dim)
            self.itself[key] = Attention(dim, heads)
            self.asks[key] = Attention(dim, heads)
            self.answers[key] = Attention(dim, heads)
            self.readers[key] = QFormer(
                {stream: dim},
                llm_dim,
                stream=stream,
                per="clip",
                num_queries=num_queries,
                dim=dim,
                layers=layers,
                heads=heads,
                cross_every=1,
            )
            self.out_widths[stream] = dim

    def forward(
        self, streams: dict[str, Tokens], prompt: Prompt | None = None
    ) -> dict[str, Tokens]:
        present = [stream for stream in self.streams if stream in streams]
        if not present:
            return streams
        if prompt is None:
            raise ValueError("clue_aggregator was called without the question; expected a prompt")
        media: dict[str, Tensor] = {}  # (B, N, D') of each stream
        masks: dict[str, Tensor] = {}  # (B, N)
        for stream in present:
            features, masks[stream] = streams[stream].flat()
            entered = self.enter[_key(stream)](features)
            read = self.itself[_key(stream)](entered, entered, masks[stream])
            media[stream] = entered + read
        words = self.words(prompt.x.to(media[present[0]].dtype))  # (B, A, D')
        clues = words
        for stream in present:
            clues = clues + self.asks[_key(stream)](words, media[stream], masks[stream])
        made = dict(streams)
        for stream in present:
            told = self.answers[_key(stream)](media[stream], clues, prompt.mask)
            shape = streams[stream].mask.shape
            x = (media[stream] + told).view(*shape, -1)  # (B, T, P, D')
            reader = self._reader(stream)
            made[stream] = reader.adapt(Tokens(x, streams[stream].mask, streams[stream].span))
        return made

    def output_grid(self, grids: dict[str, Grid]) -> dict[str, Grid]:
        made = dict(grids)
        for stream in self.streams:
            if stream in grids:
                made[stream] = self._reader(stream).grid(grids[stream])
        return made

    def _reader(self, stream: str) -> QFormer:
        return cast(QFormer, self.readers[_key(stream)])


def _key(stream: str) -> str:
    """Return a stream's name as torch takes it for a module: without dots."""
    return stream.replace(".", "_")
