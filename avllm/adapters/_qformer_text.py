"""Give a Q-Former its text side: words in, words out, and masks.

BLIP-2 (Li et al. 2023, arXiv 2301.12597, 3.1): queries and text share the self-attention, have
separate feed-forwards, and only queries have cross-attention.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WORDS = "words.weight"
READ, WRITE = 0, 1  # which learned vector a text begins with; BLIP-2's tokens [CLS] and [DEC]


class Text(NamedTuple):
    """Embedded text, as it follows the queries.

    Attributes:
        x: ``(K, L, D)`` in the Q-Former's width, positions included.
        mask: ``(K, L)`` bool.
    """

    x: Tensor
    mask: Tensor

    def pick(self, index: Tensor) -> Text:
        """Return the texts of an index ``(k,)``."""
        return Text(self.x[index], self.mask[index])

    def blank(self) -> Text:
        """Return one text of zeros in the place of none, on the graph of the others."""
        return Text(
            self.x.new_zeros(1, *self.x.shape[1:]) + self.x.sum(),
            self.mask.new_ones(1, self.mask.shape[1]),
        )


def joint_mask(queries: int, real: Tensor, causal: bool) -> Tensor:
    """Return which of queries and text see each other, ``(K, 1, Q + L, Q + L)`` bool.

    ``[:, :, i, j]`` is True where i sees j.

    Args:
        queries: Q.
        real: ``(K, L)`` bool, text that is no padding.
        causal: False, matching: all see all. True, captioning: queries see queries only, a token
            sees all queries, the tokens before it, and itself (BLIP-2's multimodal causal mask).
    """
    keys = F.pad(real, (queries, 0), value=True)  # (K, Q + L)
    seen = keys[:, None, None].expand(-1, 1, keys.shape[1], -1)  # (K, 1, Q + L, Q + L)
    if not causal:
        return seen
    at = torch.arange(keys.shape[1], device=real.device)
    return seen & ((at < queries) | (at[:, None] >= queries) & (at <= at[:, None]))


class QFormerText(nn.Module):
    """Let a Q-Former read, judge and write text, beside its layers.

    Args:
        dim: the Q-Former's width.
        llm_dim: width of the LLM's embeddings.
        vocabulary: the number of tokens of a separate vocabulary, whose learned embeddings are the
            output head, too (as in BLIP-2); None for the LLM's: its embeddings come in through a
            linear layer, its head writes.
        longest: positions.
        common: width in which query outputs and text are compared.
        std: of the embeddings at the start.

    Attributes:
        match: ``(..., D)`` -> ``(..., 2)``, no and yes: does the text belong to what was read?
        log_temperature: of the comparison; learned.
    """

    def __init__(
        self,
        dim: int,
        llm_dim: int,
        *,
        vocabulary: int | None,
        longest: int,
        std: float,
        common: int = 256,
    ) -> None:
        super().__init__()
        self.vocabulary, self.longest = vocabulary, longest
        self.positions = nn.Embedding(longest, dim)
        self.begin = nn.Parameter(torch.empty(2, dim))
        for weight in (self.positions.weight, self.begin):
            nn.init.normal_(weight, std=std)
        self.words: nn.Module
        if vocabulary is None:
            # as large as positions and queries are, however large the LLM's embeddings are
            into = nn.Linear(llm_dim, dim)
            nn.init.normal_(into.weight, std=std / llm_dim**0.5)
            nn.init.zeros_(into.bias)
            self.words = nn.Sequential(nn.LayerNorm(llm_dim), into)
        else:
            self.words = nn.Embedding(vocabulary, dim)
            nn.init.normal_(self.words.weight, std=std)
        self.query_projection, self.text_projection = nn.Linear(dim, common), nn.Linear(dim, common)
        self.log_temperature = nn.Parameter(torch.tensor([math.log(0.07)]))
        self.match = nn.Linear(dim, 2)
        self.transform = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.LayerNorm(dim))
        if vocabulary is None:
            self.to_llm = nn.Linear(dim, llm_dim)

    @property
    def scale(self) -> Tensor:
        """Return the inverse temperature, at most 100."""
        return self.log_temperature.clamp(math.log(0.01), 0.0).neg().exp().squeeze()

    def embed(self, words: Tensor, mask: Tensor, begin: int) -> Text:
        """Embed words, with their beginning in front: ``(K, 1 + L, D)``.

        Args:
            words: ``(K, L)`` ids of the separate vocabulary, or ``(K, L, D_llm)`` embeddings of the
            LLM's.
            mask: ``(K, L)`` bool.
            begin: ``READ`` or ``WRITE``.
        """
        if self.vocabulary is None:
            words = words.to(self.begin.dtype)
        first = self.begin[begin].expand(len(mask), 1, -1)
        x = torch.cat([first, self.words(words).to(first.dtype)], 1)  # (K, 1 + L, D)
        places = torch.arange(x.shape[1], device=x.device)
        return Text(x + self.positions(places), F.pad(mask, (1, 0), value=True))

    def to_words(self, hidden: Tensor, llm_head: Any) -> Tensor:
        """Map transformed states ``(n, D)`` to logits ``(n, V)``.

        The map is linear, so a mean of states gives the mean of logits.

        Args:
            hidden: of :attr:`transform`.
            llm_head: the LLM's output embeddings, which write where there is no separate
                vocabulary.
        """
        if self.vocabulary is not None:
            return F.linear(hidden, self.words.weight)  # type: ignore[arg-type]
        return llm_head(self.to_llm(hidden).to(llm_head.weight.dtype))

    def load_blip2(self, source: Mapping[str, Tensor], begins: tuple[int, int] | None) -> None:
        """Start from the text side of a ``Blip2ForImageTextRetrieval``.

        Args:
            source: its tensors, by the names that they have here.
            begins: ids of the tokens that begin a text that is read and one that is written; None
                leaves its words, which are of a separate vocabulary.

        Raises:
            ValueError: tensors are missing, or its sizes are not this one's.
        """
        theirs = {name: x for name, x in source.items() if begins is not None or name != WORDS}
        needed = [f"{part}.weight" for part in ("query_projection", "text_projection", "match")]
        missing = [name for name in [*needed, "positions.weight", WORDS] if name not in source]
        if missing:
            raise ValueError(
                f"the checkpoint's text side has no {', '.join(missing)}; copy it again"
            )
        if begins is not None:
            theirs["begin"] = theirs[WORDS][list(begins)]
        own = self.state_dict()
        odd = {
            n: (tuple(t.shape), tuple(own[n].shape))
            for n, t in theirs.items()
            if t.shape != own[n].shape
        }
        if odd:
            name, (seen, expected) = next(iter(odd.items()))
            raise ValueError(
                f"the checkpoint's text side has {name} {seen}, this Q-Former's {expected}; "
                f"give text: {len(source[WORDS])}, the size of its "
                "vocabulary, or text: llm"
            )
        self.load_state_dict(own | theirs)  # what a checkpoint does not hold stays as it began
