"""Mark the tokens of regions with the words for them: Omni-RGPT (arXiv 2501.08326, 3.1)."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from avllm.adapters._marks import coverage, first_steps, marks_of
from avllm.adapters.base import Prompt, StreamAdapter
from avllm.errors import UserError
from avllm.tokens import REGION_BOXES, Tokens

MARK = "<mark_{}>"
DEFAULT_NUMBER = 100


class TokenMarks(StreamAdapter):
    """Add a mark to the tokens that a region covers; text refers to the region by the same mark.

    Marks are added words, ``<mark_0>`` and so on, which train by the rule ``words.``; a region in a
    text (``type: region``) is written as its mark. A row's regions have the marks 0, 1, 2, ... in
    their order; with ``data.rows: {type: token_marks}`` they are drawn in training, so that all
    marks learn and none means a place or an order. A token of whose patch a box covers a part
    gets this part of the mark; where regions overlap, their marks are averaged.

    The stream holds the patches of each picture in their places and has the LLM's width: put it
    after the projection, before what packs or pools. It changes nothing as long as it is not bound
    to a model.

    Args:
        stream: the stream to mark.
        n: number of marks, the most regions of a row.
        steps: ``all`` steps that a region is in, or ``first``: the first alone, so that the model
            has to follow it (the paper's videos; see the objective ``region_guide``).
    """

    def __init__(
        self,
        widths: dict[str, int],
        llm_dim: int,
        *,
        stream: str,
        n: int = DEFAULT_NUMBER,
        steps: str = "all",
    ) -> None:
        super().__init__(widths, llm_dim, stream)
        if n < 1:
            raise ValueError(f"token_marks on {stream!r} has n {n}; expected 1 or more")
        if steps not in ("all", "first"):
            raise ValueError(
                f"token_marks on {stream!r} has steps {steps!r}; expected 'all' or 'first'"
            )
        self.n = n
        self.steps = steps
        self._model: Any = None  # a weak reference

    @classmethod
    def added_words(cls, options: Mapping[str, Any]) -> list[str]:
        return [MARK.format(index) for index in range(options.get("n", DEFAULT_NUMBER))]

    def bind(self, model: Any) -> None:
        """Keep the model, whose words are read in each call.

        Raises:
            ValueError: the stream has not the LLM's width.
        """
        if self.in_dim != self.llm_dim:
            raise ValueError(
                f"token_marks on {self.stream!r}: its width is {self.in_dim}; expected the LLM's, "
                f"{self.llm_dim}. Put it after the projection"
            )
        self._model = weakref.ref(model)

    def adapt(self, tokens: Tokens, prompt: Prompt | None = None) -> Tokens:
        if self._model is None or REGION_BOXES not in tokens.extra:
            return tokens
        share = coverage(tokens.extra, tokens.x.shape[2])  # (B, T, K, P)
        if self.steps == "first":
            share = share * first_steps(tokens.extra).unsqueeze(-1)
        share = share / share.sum(2, keepdim=True).clamp(min=1)
        marks = self._table()[marks_of(tokens.extra)]  # (B, K, D)
        added = torch.einsum("btkp,bkd->btpd", share.to(marks.dtype), marks)
        return tokens.with_x(tokens.x + added.to(tokens.x.dtype))

    def _table(self) -> torch.Tensor:
        """Return the vectors of the marks, which are the embeddings of their words: ``(n, D)``.

        Raises:
            UserError: ``no_words``: the model lacks them.
        """
        model = self._model()
        words = self.added_words({"n": self.n})
        missing = [word for word in words if word not in model.config.words]
        if missing:
            raise UserError(
                f"token_marks on {self.stream!r}: the model has no word {missing[0]!r}; words are "
                "added when a model is composed, so begin with a stage that has this adapter",
                reason="no_words",
            )
        ids = torch.tensor([model.config.words[word] for word in words])
        rows = model.words.rows_of(ids.to(model.words.places.device))  # (n,)
        return model.words.input(rows)


def mark_words(connector: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the words of the marks that a connector's specs name; none without marks."""
    for spec in connector:
        if spec.get("type") == "token_marks":
            return TokenMarks.added_words(spec)
    return []
