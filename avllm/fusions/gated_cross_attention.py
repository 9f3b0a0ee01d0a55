"""Put gated cross-attention between the LLM's layers (Flamingo, arXiv 2204.14198, section 3.1.2).

CosMo (arXiv 2401.00849) uses the same blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from avllm.errors import UserError
from avllm.fusions.base import Fusion, decoder_layers
from avllm.tokens import Tokens


@dataclass
class Memory:
    """Hold the media of R rows for their text to attend to: M tokens a row, some of them padding.

    Attributes:
        x: ``(R, M, D)``. mask: ``(R, M)`` bool, True = real.
        at: ``(R, M)`` long, the place in the row at which the token's clip begins.
        clip_segments: ``(R, M, 2)`` long (group, part) of the clip in packed rows, or None.
        segments: ``(R, L, 2)`` long of the rows, or None.
        first: place of the first hidden state of the LLM's present call: the length of its cache.
        projected: keys and values by block, kept where no gradient is wanted: each step of an
            answer reads them.
    """

    x: Tensor
    mask: Tensor
    at: Tensor
    clip_segments: Tensor | None
    segments: Tensor | None
    first: int = 0
    projected: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def seen(self, length: int, only_before: bool) -> Tensor:
        """Return the media tokens that each place attends to, ``(R, length, M)`` bool.

        Args:
            length: number of places, from ``first`` on.
            only_before: a place attends only to the latest clip that begins before it.
        """
        seen = self.mask[:, None].expand(-1, length, -1)  # (R, L, M)
        if self.segments is not None and self.clip_segments is not None:
            rows = self.segments[:, self.first : self.first + length, None]  # (R, L, 1, 2)
            clips = self.clip_segments[:, None]  # (R, 1, M, 2)
            of_group = rows[..., 0] == clips[..., 0]  # (R, L, M)
            of_part = (rows[..., 1] == clips[..., 1]) | (clips[..., 1] == 0)
            seen = seen & of_group & of_part
        if only_before:
            places = torch.arange(self.first, self.first + length, device=self.at.device)  # (L,)
            seen = seen & (self.at[:, None] <= places[:, None])
            latest = torch.where(seen, self.at[:, None], -1).amax(-1, keepdim=True)  # (R, L, 1)
            seen = seen & (self.at[:, None] == latest)
        return seen


_ACTIVE: ContextVar[tuple[nn.Module, Memory] | None] = ContextVar(
    "gated_cross_attention", default=None
)


class GatedCrossAttention(Fusion):
    """Put a gated cross-attention and a gated feed-forward before every n-th layer of the LLM.

    Both are multiplied by the tanh of a gate that starts at 0, so that training starts from the LLM
    as it was. A place that sees no media passes unchanged, through the feed-forward too (Flamingo's
    acts there), so that text alone gets the LLM's own answer at any point of training.

    Args:
        streams: the streams that are consumed.
        every: n; the blocks lie before layers n, 2n, ...
        heads, dim_head: heads of the attention, and the width of each.
        ff_mult: width of the feed-forward, in widths of the LLM.
        only_before: each text token attends to the latest clip that begins before it, as in
            Flamingo; clips without text between them count as one. False: to all clips of its row.

    Raises:
        ValueError: the LLM has fewer layers than ``every``.
    """

    def __init__(
        self,
        widths: dict[str, int],
        llm: Any,
        *,
        streams: list[str],
        every: int = 4,
        heads: int = 8,
        dim_head: int = 64,
        ff_mult: int = 4,
        only_before: bool = True,
    ) -> None:
        super().__init__(widths, llm, streams=streams)
        layers = decoder_layers(llm)
        if not 1 <= every <= len(layers):
            raise ValueError(
                f"every is {every}; expected 1 to {len(layers)}, the number of the LLM's layers"
            )
        if len({widths[stream] for stream in streams}) > 1:
            of_streams = [widths[stream] for stream in streams]
            raise ValueError(
                f"streams {streams} have widths {of_streams}; expected one width: "
                "end the connector with an adapter that projects them to it"
            )
        self.only_before = only_before
        width = llm.get_input_embeddings().weight.shape[-1]
        self.blocks = nn.ModuleList(
            GatedBlock(width, widths[streams[0]], heads=heads, dim_head=dim_head, ff_mult=ff_mult)
            for _ in range(len(layers) // every)
        )
        # Hooks rather than layers around the LLM's: names of weights, LoRA's targets too, remain.
        llm.get_decoder().register_forward_pre_hook(
            partial(_note_first_place, self), with_kwargs=True
        )
        for number in range(len(self.blocks)):
            layer = layers[(number + 1) * every - 1]
            layer.register_forward_pre_hook(partial(_attend, self, number), with_kwargs=True)

    def prepare(self, tokens: dict[str, Tokens], batch: Any) -> Memory | None:
        """Gather the consumed streams row by row; None where the batch has none of them."""
        present = [tokens[stream] for stream in self.streams if stream in tokens]
        return gather_memory(present, batch) if present else None

    @contextmanager
    def context(self, llm: Any, prepared: Memory | None) -> Iterator[None]:
        """Let the LLM's layers attend to the memory."""
        del llm  # its layers have their hooks already
        before = _ACTIVE.set(None if prepared is None else (self, prepared))
        try:
            yield
        finally:
            _ACTIVE.reset(before)

    def attend(self, number: int, x: Tensor, memory: Memory) -> Tensor:
        """Pass hidden states ``(R * beams, L, D)`` through a block."""
        block = cast(GatedBlock, self.blocks[number])
        projected = memory.projected.get(number)
        if projected is None:
            projected = block.project(memory.x)
            if not torch.is_grad_enabled():
                memory.projected[number] = projected
        key, value = projected
        seen = memory.seen(x.shape[1], self.only_before)  # (R, L, M)
        beams = x.shape[0] // seen.shape[0]
        if beams > 1:  # each row of the batch is given several times in succession
            seen = seen.repeat_interleave(beams, 0)
            key = key.repeat_interleave(beams, 0)
            value = value.repeat_interleave(beams, 0)
        result: Tensor = block(x, key, value, seen)
        return result


class GatedBlock(nn.Module):
    """Cross-attention and feed-forward, each times the tanh of a gate.

    Args:
        width: of the LLM.
        media_width: of the media tokens.
        heads, dim_head, ff_mult: as in the fusion.
    """

    def __init__(
        self,
        width: int,
        media_width: int,
        *,
        heads: int,
        dim_head: int,
        ff_mult: int,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.norm_media = nn.LayerNorm(media_width)
        self.query = nn.Linear(width, heads * dim_head, bias=False)
        self.key_value = nn.Linear(media_width, 2 * heads * dim_head, bias=False)
        self.out = nn.Linear(heads * dim_head, width, bias=False)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, ff_mult * width, bias=False),
            nn.GELU(),
            nn.Linear(ff_mult * width, width, bias=False),
        )
        self.attention_gate = nn.Parameter(torch.zeros(1))
        self.feed_forward_gate = nn.Parameter(torch.zeros(1))

    def project(self, media: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values ``(R, H, M, D / H)`` of media ``(R, M, D)``."""
        media = media.to(self.norm_media.weight.dtype)
        key, value = self.key_value(self.norm_media(media)).chunk(2, dim=-1)  # (R, M, H * dim_head)
        return self._split(key), self._split(value)

    def forward(self, x: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
        """Let ``x (R, L, D)`` attend to the media that it sees, ``seen (R, L, M)`` bool."""
        own = x.to(self.norm.weight.dtype)
        sees = seen.any(-1, keepdim=True)  # (R, L, 1)
        query = self._split(self.query(self.norm(own)))  # (R, H, L, dim_head)
        # A place that sees nothing attends to everything, since its softmax would be empty, and its
        # result is multiplied by 0.
        mask = (seen | ~sees)[:, None]  # (R, 1, L, M)
        key = key.to(query.dtype)
        value = value.to(query.dtype)
        attended = scaled_dot_product_attention(query, key, value, attn_mask=mask)
        attended = self.out(attended.transpose(1, 2).flatten(2))  # (R, L, D)
        x = x + (self.attention_gate.tanh() * attended * sees).to(x.dtype)
        added = self.feed_forward(x.to(self.norm.weight.dtype))
        return x + (self.feed_forward_gate.tanh() * added * sees).to(x.dtype)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (R, H, N, dim_head)


def gather_memory(streams: list[Tokens], batch: Any) -> Memory:
    """Gather the real tokens of each row's clips, M >= 1 a row.

    Args:
        streams: ``(B, T, P, D)`` each, of the same B clips.
        batch: R rows.

    Returns:
        the memory, ``(R, M, D)``.
    """
    flat = [tokens.flat() for tokens in streams]
    x = torch.cat([features for features, _ in flat], dim=1)  # (B, N, D)
    real = torch.cat([mask for _, mask in flat], dim=1)  # (B, N)
    clip = real.nonzero()[:, 0]  # (K,) the clip of each real token, ascending; so are the rows
    row = batch.clip_row[clip]  # (K,)
    rows = batch.input_ids.shape[0]
    counts = row.bincount(minlength=rows)  # (R,)
    most = max(1, int(counts.max()))
    mask = torch.arange(most, device=row.device) < counts[:, None]  # (R, M)
    memory = x.new_zeros(rows, most, x.shape[-1])
    # Row by row in the order of the tokens, (R, M, D).
    memory = memory.masked_scatter(mask[..., None], x[real])
    at = torch.zeros_like(mask, dtype=torch.long)
    at[mask] = batch.clip_at[clip]
    clip_segments = None
    if batch.segments is not None:
        clip_segments = batch.segments.gather(1, at[..., None].expand(-1, -1, 2))  # (R, M, 2)
        # A clip belongs to the shared segment of its group, also where its run is empty and the
        # token at its place begins a question.
        clip_segments[..., 1] = 0
    return Memory(memory, mask, at, clip_segments, batch.segments)


def _note_first_place(
    fusion: GatedCrossAttention, decoder: Any, args: Any, kwargs: dict[str, Any]
) -> None:
    """Note at which place of the rows the decoder's call begins."""
    active = _ACTIVE.get()
    if active is not None and active[0] is fusion:
        cache = kwargs.get("past_key_values")
        active[1].first = 0 if cache is None else int(cache.get_seq_length())


def _attend(
    fusion: GatedCrossAttention,
    number: int,
    layer: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Change the hidden states that a layer of the LLM is called with, where a context is open."""
    active = _ACTIVE.get()
    if active is None or active[0] is not fusion:
        return None
    if args:
        return (fusion.attend(number, args[0], active[1]), *args[1:]), kwargs
    if "hidden_states" not in kwargs:
        raise UserError(
            f"{type(layer).__name__} is called with {sorted(kwargs)} and no hidden states; "
            "gated_cross_attention needs an LLM whose layers take hidden states as an argument"
        )
    changed = fusion.attend(number, kwargs["hidden_states"], active[1])
    return args, {**kwargs, "hidden_states": changed}
