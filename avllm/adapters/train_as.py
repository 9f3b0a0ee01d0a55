"""Train a stream on another's embeddings: Video-LLaMA's audio branch (arXiv 2306.02858, 2.1.2)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from avllm.adapters.base import Adapter, Prompt, masked_mean, time_windows, variant
from avllm.adapters.substitute import nearest
from avllm.tokens import Grid, Tokens

VARIANT = "train_as"
"""The name by which the row maker of the same name marks rows of training."""


class TrainAs(Adapter):
    """Feed a stream another modality's embedding in training, and its own at inference.

    Two encoders that share a space (ImageBind's) say the same of a dog that is seen and of one that
    is heard. So what follows a stream can be trained on clips that lack it: videos with captions
    are many, sounds with captions few. Put it before the stream's other adapters, and take the
    rows of ``data.rows: {type: train_as}``; all other rows pass unchanged.

    Args:
        stream: the stream that is trained, such as ``audio``.
        by: the stream whose embeddings it is given, such as ``video``; of the same width.
        seconds: length of the stream's own steps; each takes the embedding of the step of ``by``
            that is nearest in time. None: the steps of ``by``.
        over: True: also where a clip has the stream itself; else only where it lacks it.
        instead: True: ``by`` is not shown beside it, so that the answer has to come from the
            stream that is trained.
    """

    def __init__(
        self,
        widths: dict[str, int],
        llm_dim: int,
        *,
        stream: str,
        by: str,
        seconds: float | None = None,
        over: bool = False,
        instead: bool = False,
    ) -> None:
        super().__init__(widths, llm_dim)
        if self.require(stream) != self.require(by):
            raise ValueError(
                f"train_as: {stream!r} has width {widths[stream]} and {by!r} {widths[by]}; "
                "expected two encoders of one space, and so of one width"
            )
        if stream == by:
            raise ValueError(f"train_as: stream and by are both {by!r}; expected two streams")
        if seconds is not None and seconds <= 0:
            raise ValueError(f"train_as on {stream!r} has seconds {seconds}; expected more than 0")
        self.stream = stream
        self.by = by
        self.seconds = seconds
        self.over = over
        self.instead = instead

    def forward(
        self, streams: dict[str, Tokens], prompt: Prompt | None = None
    ) -> dict[str, Tokens]:
        if variant() != VARIANT or self.by not in streams:
            return streams
        other = streams[self.by]
        own = streams.get(self.stream)
        given = other.present()  # (B,) clips whose stream is given the other's embeddings
        if own is not None and not self.over:
            given = given & ~own.present()
        if not bool(given.any()):
            return streams
        made = self._stand_in(other)
        if own is not None:
            made = _choose(given, made, own)
        changed = {**streams, self.stream: made}
        if self.instead:
            changed[self.by] = replace(other, mask=other.mask & ~given[:, None, None])
        return self._in_order(changed)

    def output_grid(self, grids: dict[str, Grid]) -> dict[str, Grid]:
        if variant() != VARIANT or self.by not in grids:
            return grids
        other = grids[self.by]
        own = grids.get(self.stream)
        has_own = own is not None and bool(own.mask.any())
        if not bool(other.mask.any()) or (has_own and not self.over):
            return grids
        span, mask = self._clock(other.span[None], other.mask.any(-1)[None])
        changed = {**grids, self.stream: Grid(span[0], mask[0])}
        if self.instead:
            changed[self.by] = other._replace(mask=torch.zeros_like(other.mask))
        return self._in_order(changed)

    def _in_order(self, streams: dict) -> dict:  # type: ignore[type-arg]  # of tokens or of grids
        """Return the streams in the model's order, in which layouts put them at inference."""
        return {name: streams[name] for name in self.in_widths if name in streams}

    def _clock(self, span: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Return the steps of the stream for those of the other.

        Args:
            span: ``(B, T, 2)``. real: ``(B, T)`` bool.

        Returns:
            seconds ``(B, W, 2)`` and mask ``(B, W, 1)`` bool.
        """
        if self.seconds is None:
            return span, real.unsqueeze(-1)
        windows = time_windows(span, real, self.seconds).span  # (B, W, 2)
        exists = windows[..., 1] - windows[..., 0] > 1e-4  # (B, W)
        exists[:, 0] = True  # a picture lasts 0 s and has one step
        return windows, (exists & real.any(1, keepdim=True)).unsqueeze(-1)

    def _stand_in(self, other: Tokens) -> Tokens:
        """Return the other's embeddings at the stream's steps, ``(B, W, 1, D)``."""
        real = other.mask.any(-1)  # (B, T)
        x = masked_mean(other.x, other.mask, 2)  # (B, T, D)
        span, mask = self._clock(other.span, real)
        step = nearest(span, other.span, real)  # (B, W)
        clips = torch.arange(len(x), device=x.device)[:, None]
        return Tokens(x[clips, step].unsqueeze(2), mask, span)


def _choose(first: Tensor, one: Tokens, other: Tokens) -> Tokens:
    """Return the clips of ``one`` where ``first (B,)`` is True, else of ``other``; both padded."""
    b = len(first)
    t = max(one.x.shape[1], other.x.shape[1])
    p = max(one.x.shape[2], other.x.shape[2])
    x = other.x.new_zeros(b, t, p, other.x.shape[-1])
    mask = other.mask.new_zeros(b, t, p)
    span = other.span.new_zeros(b, t, 2)
    for chosen, tokens in ((first, one), (~first, other)):
        _, steps, width, _ = tokens.x.shape
        x[chosen, :steps, :width] = tokens.x[chosen].to(x.dtype)
        mask[chosen, :steps, :width] = tokens.mask[chosen]
        span[chosen, :steps] = tokens.span[chosen]
    return Tokens(x, mask, span)
