"""Mark tokens with the words of their times and places: LLaVA-ST (arXiv 2501.08282, 3.1)."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from avllm.adapters.base import Prompt, StreamAdapter, whole_span
from avllm.errors import UserError
from avllm.registry import build
from avllm.tokens import Tokens

WIDTH_WORD = "<width_{}>"
HEIGHT_WORD = "<height_{}>"


class AnchorPosition(StreamAdapter):
    """Add to each token the mean of the input and output rows of the words for its coordinates.

    So what is seen at a moment carries the vectors by which text reads and writes that moment. The
    words of time are those of the time codec (``anchors``, ``time_tokens``), spread evenly over the
    clip; between two of them, rows are interpolated linearly. They train by the rule ``words.``.

    The stream has the LLM's width here: put it after the projection, and before what packs or
    pools. It changes nothing as long as it is not bound to a model.

    Args:
        stream: the stream to mark.
        width: number of words for the horizontal place, ``<width_0>`` at the left edge of the
            picture; LLaVA-ST has 100. 0: none. Texts and answers may hold them.
        height: number of words for the vertical place, ``<height_0>`` at the upper edge.
        neighbours: True: each word's gradient also reaches the others of its axis, halved with
            each step away from it (the paper's neighbouring token propagation); values are the
            same.
    """

    def __init__(
        self,
        widths: dict[str, int],
        llm_dim: int,
        *,
        stream: str,
        width: int = 0,
        height: int = 0,
        neighbours: bool = False,
    ) -> None:
        super().__init__(widths, llm_dim, stream)
        if min(width, height) < 0 or 1 in (width, height):
            raise ValueError(
                f"anchor_position on {stream!r} has width {width} and height {height}; "
                "expected 0 (none) or at least 2 words of each"
            )
        self.width = width
        self.height = height
        self.neighbours = neighbours
        self._model: Any = None  # a weak reference

    @classmethod
    def added_words(cls, options: Mapping[str, Any]) -> list[str]:
        return [
            *_words(WIDTH_WORD, options.get("width", 0)),
            *_words(HEIGHT_WORD, options.get("height", 0)),
        ]

    def bind(self, model: Any) -> None:
        """Keep the model, whose words are read in each call.

        Raises:
            ValueError: the stream has not the LLM's width, or the time codec has no words.
        """
        if self.in_dim != self.llm_dim:
            raise ValueError(
                f"anchor_position on {self.stream!r}: its width is {self.in_dim}; expected the "
                f"LLM's, {self.llm_dim}. Put it after the projection"
            )
        if not _time_words(model):
            raise ValueError(
                f"anchor_position on {self.stream!r}: the time codec "
                f"{model.config.time_codec['type']!r} has no words; expected one that adds some: "
                "time_codec: {type: anchors}"
            )
        self._model = weakref.ref(model)

    def adapt(self, tokens: Tokens, prompt: Prompt | None = None) -> Tokens:
        if self._model is None:
            return tokens
        model = self._model()
        clip = whole_span(tokens.span, tokens.mask.any(-1))  # (B, 1, 2)
        seconds = (clip[..., 1] - clip[..., 0]).clamp(min=1e-6)
        share = (tokens.span.mean(-1) - clip[..., 0]) / seconds  # (B, T)
        added = interpolate(self._table(model, _time_words(model)), share)  # (B, T, D)
        x = tokens.x + added.to(tokens.x.dtype).unsqueeze(2)
        if self.width or self.height:
            x = x + self._places(model, x.shape[2]).to(x.dtype)  # (P, D) for every step
        return tokens.with_x(x)

    def _places(self, model: Any, tokens: int) -> Tensor:
        """Return the sum of the rows for the place of each patch of a square grid, ``(P, D)``.

        Raises:
            UserError: ``no_grid``, the tokens of a step are no square.
        """
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise UserError(
                f"anchor_position on {self.stream!r}: {tokens} tokens a step; expected a square "
                "grid of patches, or width: 0 and height: 0",
                reason="no_grid",
            )
        device = next(model.words.parameters()).device
        centres = (torch.arange(side, device=device) + 0.5) / side  # (side,)
        grid = torch.zeros(side, side, self.llm_dim, device=device)
        if self.width:
            table = self._table(model, _words(WIDTH_WORD, self.width))
            grid = grid + interpolate(table, centres)[None]
        if self.height:
            table = self._table(model, _words(HEIGHT_WORD, self.height))
            grid = grid + interpolate(table, centres)[:, None]
        return grid.flatten(0, 1)

    def _table(self, model: Any, words: Sequence[str]) -> Tensor:
        """Return the mean of each word's input and output row, ``(n, D)``.

        Raises:
            UserError: ``no_words``, the model lacks one of them.
        """
        missing = [word for word in words if word not in model.config.words]
        if missing:
            raise UserError(
                f"anchor_position on {self.stream!r}: the model has no word {missing[0]!r}; words "
                "are added when a model is composed, so begin with a stage that has this adapter",
                reason="no_words",
            )
        ids = torch.tensor([model.config.words[word] for word in words])
        rows = model.words.rows_of(ids.to(model.words.places.device))  # (n,)
        table = (model.words.input.weight[rows] + model.words.output.weight[rows]) / 2
        return spread_gradient(table) if self.neighbours else table


def interpolate(table: Tensor, share: Tensor) -> Tensor:
    """Read a table of evenly spaced anchors, linearly between two of them.

    Args:
        table: ``(n, D)``, the first anchor at 0 and the last at 1.
        share: ``(...)``, from 0 to 1.

    Returns:
        ``(..., D)``.
    """
    last = len(table) - 1
    place = share.clamp(0, 1) * last
    low = place.floor().long().clamp(max=last - 1)
    weight = (place - low).unsqueeze(-1).to(table.dtype)
    return table[low] * (1 - weight) + table[low + 1] * weight


def spread_gradient(table: Tensor) -> Tensor:
    """Return a table ``(n, D)`` unchanged; the gradient of row i reaches row j by ``2^-|i-j|``.

    It is ``w + (M w - stopgrad(M w))`` with ``M_ij = 2^-|i-j|`` where i and j differ and else 0,
    since a row has its own gradient already.
    """
    number = torch.arange(len(table), device=table.device)
    shares = 0.5 ** (number[:, None] - number).abs().to(table.dtype)  # (n, n)
    spread = (shares - torch.eye(len(table), dtype=table.dtype, device=table.device)) @ table
    return table + (spread - spread.detach())


def _words(form: str, number: int) -> list[str]:
    return [form.format(index) for index in range(number)]


def _time_words(model: Any) -> list[str]:
    """Return the words of a model's time codec, in the order of time."""
    words: list[str] = build("time_codecs", model.config.time_codec).words()
    return words
