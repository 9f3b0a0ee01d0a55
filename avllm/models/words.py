"""Add vocabulary entries to the LLM, which train and are saved as a separate part (``words``).

The LLM's embedding matrix and head are not resized, so that a checkpoint holds ``2 * n * D``
numbers for n words and never the whole LLM. Hooks on the two modules put the added rows beside the
LLM's own wherever it embeds ids or makes logits: in training, in ``generate`` and in loops that
call the LLM directly. Without added words there are no hooks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from avllm.config_model import ModelConfig
from avllm.errors import UserError
from avllm.registry import build, load
from avllm.time_codecs.base import TimeCodec

SAMPLED = 1024  # entries of the LLM; added words start from their mean
NOISE = 0.1  # share of their standard deviation, so that added words differ from the start


class AddedWords(nn.Module):
    """The embeddings and output rows of added words.

    Args:
        ids: token id of each word; they may lie within the LLM's (padded) vocabulary or after it.
        width: D of the LLM's embeddings.
        head_width: D of what the LLM's head reads; usually the same.
    """

    def __init__(self, ids: Iterable[int], width: int, head_width: int) -> None:
        super().__init__()
        self.ids = sorted(ids)  # config.json sorts names: their order is not kept by a save
        self.input = nn.Embedding(len(self.ids), width)
        self.output = nn.Linear(head_width, len(self.ids), bias=False)
        places = torch.full((max(self.ids) + 1,), -1)
        places[self.ids] = torch.arange(len(self.ids))
        # By token id: the row of an added word, -1 for any other id.
        self.register_buffer("places", places, persistent=False)
        self._handles: list[Any] = []

    @classmethod
    def beside(cls, llm: Any, words: Mapping[str, int]) -> AddedWords:
        """Make rows for words (token id by word), near the mean of the LLM's own rows."""
        table = llm.get_input_embeddings()
        head = llm.get_output_embeddings()
        added = cls(
            words.values(),
            table.weight.shape[-1],
            getattr(head, "in_features", head.weight.shape[-1]),
        )
        chosen = torch.linspace(0, table.weight.shape[0] - 1, SAMPLED).long().unique()
        with torch.no_grad():
            # The module is called, not its matrix read: some LLMs scale the embeddings.
            _start_near(added.input.weight, table(chosen.to(table.weight.device)))
            if head.weight.is_floating_point():
                _start_near(added.output.weight, head.weight[chosen.to(head.weight.device)])
            else:  # a quantised head has no readable rows: added words start equally likely
                added.output.weight.zero_()
        return added

    def take(self, other: AddedWords) -> None:
        """Copy the rows of the words that another set holds, by token id."""
        rows = [self.ids.index(token_id) for token_id in other.ids]
        with torch.no_grad():
            self.input.weight[rows] = other.input.weight.to(self.input.weight)
            self.output.weight[rows] = other.output.weight.to(self.output.weight)

    def attach(self, llm: Any) -> None:
        """Register hooks on the LLM's embedding and head; again after PEFT has wrapped them."""
        self.detach()
        table = llm.get_input_embeddings()
        head = llm.get_output_embeddings()
        self._handles = [
            table.register_forward_pre_hook(self._before_embedding),
            table.register_forward_hook(self._after_embedding),
            head.register_forward_hook(self._after_head),
        ]

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def rows_of(self, ids: Tensor) -> Tensor:
        """Return the row of each token id ``(...)``; -1 for an id that is no added word."""
        places = self.places
        assert isinstance(places, Tensor)
        last = len(places) - 1
        return torch.where(ids <= last, places[ids.clamp(max=last)], -1)

    def _before_embedding(self, table: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Replace the ids of added words by 0, an id that the LLM's embedding has."""
        rows = self.rows_of(args[0])
        ids = args[0].masked_fill(rows >= 0, 0)
        ids.rows_of_words = rows  # read by the hook after the module, which gets this tensor
        return ids, *args[1:]

    def _after_embedding(self, table: nn.Module, args: tuple[Any, ...], embedded: Tensor) -> Tensor:
        """Write the embeddings of added words into ``(..., D)``."""
        rows = args[0].rows_of_words
        added = self.input(rows.clamp(min=0)).to(embedded.dtype)
        return torch.where((rows >= 0).unsqueeze(-1), added, embedded)

    def _after_head(self, head: nn.Module, args: tuple[Any, ...], logits: Tensor) -> Tensor:
        """Write the logits of added words into ``(..., V)``; ids without a word get the minimum."""
        added = self.output(args[0].to(self.output.weight.dtype)).to(logits.dtype)  # (..., n)
        missing = max(0, max(self.ids) + 1 - logits.shape[-1])
        wide = pad(logits, (0, missing), value=torch.finfo(logits.dtype).min)
        return wide.index_copy(-1, torch.tensor(self.ids, device=logits.device), added)


def _start_near(rows: Tensor, own: Tensor) -> None:
    """Fill rows ``(n, D)`` with the mean of the LLM's own ``(m, D)`` and a little noise."""
    own = own.detach().float()
    noise = torch.randn(rows.shape) * NOISE
    rows.copy_(own.mean(0) + noise.to(own.device) * own.std(0))


def checked_words(words: Mapping[str, int], taken: Mapping[str, int]) -> dict[str, int]:
    """Return new words with their token ids, if neither is in use.

    Args:
        words: token id by new word.
        taken: token ids of placeholders and earlier words, by name.

    Raises:
        UserError: no words are given, or a word or an id is in use, or one id is given twice.
    """
    if not words:
        raise UserError(
            "no words are given to add; expected {word: token id}, as add_to_tokenizer makes them"
        )
    names = {token_id: name for name, token_id in taken.items()}
    for word, token_id in words.items():
        if word in taken:
            raise UserError(
                f"the word {word!r} was added before, with id {taken[word]}; leave it out"
            )
        if token_id in names:
            raise UserError(
                f"the word {word!r} has the id {token_id} of {names[token_id]!r}; add words "
                "to the tokenizer with AVProcessor.add_words, which gives them ids after all others"
            )
        names[token_id] = word
    return dict(words)


def needed_words(description: ModelConfig) -> list[str]:
    """Return the words that a model's time codec and adapters need in the vocabulary."""
    codec: TimeCodec = build("time_codecs", description.time_codec)
    words = codec.words()
    for spec in description.connector:
        options = {name: value for name, value in spec.items() if name != "type"}
        words += load("adapters", spec["type"]).added_words(options)
    return list(dict.fromkeys(words))


def load_words(tokenizer: PreTrainedTokenizerBase, description: ModelConfig) -> dict[str, int]:
    """Return the token ids of the :func:`needed_words`, from a tokenizer of ``load_tokenizer``."""
    return {word: int(tokenizer.convert_tokens_to_ids(word)) for word in needed_words(description)}  # type: ignore[arg-type]


def add_to_tokenizer(tokenizer: PreTrainedTokenizerBase, words: Iterable[str]) -> dict[str, int]:
    """Add words to a tokenizer, after all of its ids, and return their ids.

    Raises:
        UserError: the tokenizer has one of them already, so that its row is the LLM's own.
    """
    words = list(words)
    vocabulary = tokenizer.get_vocab()
    old = [word for word in words if word in vocabulary]
    if old:
        raise UserError(
            f"the LLM's tokenizer has the word {old[0]!r} already (id {vocabulary[old[0]]}); "
            "choose words that it does not have"
        )
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])
    return {word: int(tokenizer.convert_tokens_to_ids(word)) for word in words}  # type: ignore[arg-type]


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, words: Mapping[str, int]) -> None:
    """Refuse a tokenizer that gives a model's added words other ids than the model.

    Raises:
        UserError: names the word and both ids.
    """
    vocabulary = tokenizer.get_vocab() if words else {}
    for word, token_id in words.items():
        seen = vocabulary.get(word)
        if seen != token_id:
            raise UserError(
                f"the tokenizer has {word!r} as id {seen}, the model was given "
                f"id {token_id}; take the tokenizer that the words were added to "
                "(AVProcessor.add_words)"
            )
