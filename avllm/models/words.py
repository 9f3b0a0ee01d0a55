"""Added words: vocabulary entries beyond the LLM's own, which train and are saved as a part of their own (``words``).

The LLM's embedding matrix and head are not resized, so that a checkpoint holds ``2 * n * D`` numbers for n words and
never the whole LLM. Hooks on the two modules put the added rows beside the LLM's own wherever it embeds ids or makes
logits: in training, in ``generate`` and in loops that call the LLM directly. Without added words there are no hooks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from avllm.config import ModelConfig
from avllm.errors import UserError
from avllm.registry import build
from avllm.time_codecs.base import TimeCodec

SAMPLED = 1024  # of the LLM's own entries, whose mean an added word starts from
NOISE = 0.1  # of their standard deviation, so that added words differ from the start


class AddedWords(nn.Module):
    """The embeddings and output rows of added words.

    Args:
        ids: token id of each word; they may lie within the LLM's (padded) vocabulary or after it.
        width: D of the LLM's embeddings.
        head_width: D of what the LLM's head reads; usually the same.
    """

    def __init__(self, ids: Iterable[int], width: int, head_width: int) -> None:
        super().__init__()
        self.ids = sorted(ids)  # not the order in which they are named: config.json sorts names
        self.input = nn.Embedding(len(self.ids), width)
        self.output = nn.Linear(head_width, len(self.ids), bias=False)
        places = torch.full((max(self.ids) + 1,), -1)
        places[self.ids] = torch.arange(len(self.ids))
        self.register_buffer("places", places, persistent=False)  # by token id the row of a word, -1 of any other
        self._handles: list[Any] = []

    @classmethod
    def beside(cls, llm: Any, words: Mapping[str, int]) -> AddedWords:
        """Make the rows of words (token id by word) for an LLM; they start near the mean of the LLM's own."""
        table, head = llm.get_input_embeddings(), llm.get_output_embeddings()
        added = cls(words.values(), table.weight.shape[-1], getattr(head, "in_features", head.weight.shape[-1]))
        chosen = torch.linspace(0, table.weight.shape[0] - 1, SAMPLED).long().unique()
        with torch.no_grad():
            # through the module: some LLMs scale what the matrix gives
            _start_near(added.input.weight, table(chosen.to(table.weight.device)))
            if head.weight.is_floating_point():
                _start_near(added.output.weight, head.weight[chosen.to(head.weight.device)])
            else:  # a quantised head shows no rows: all added words are equally likely at first
                added.output.weight.zero_()
        return added

    def take(self, other: AddedWords) -> None:
        """Copy the rows of the words that another set holds, by token id."""
        mine = [self.ids.index(i) for i in other.ids]
        with torch.no_grad():
            self.input.weight[mine] = other.input.weight.to(self.input.weight)
            self.output.weight[mine] = other.output.weight.to(self.output.weight)

    def attach(self, llm: Any) -> None:
        """Hook into the LLM's embedding and head, as they are now: to be called again after PEFT wrapped them."""
        self.detach()
        table, head = llm.get_input_embeddings(), llm.get_output_embeddings()
        self._handles = [
            table.register_forward_pre_hook(self._before_embedding),
            table.register_forward_hook(self._after_embedding),
            head.register_forward_hook(self._after_head),
        ]

    def detach(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def rows_of(self, ids: Tensor) -> Tensor:
        """Return the row of each token id, ``(...)`` -> ``(...)`` long; -1 where the id is no added word."""
        places = self.places
        assert isinstance(places, Tensor)
        last = len(places) - 1
        return torch.where(ids <= last, places[ids.clamp(max=last)], -1)

    def _before_embedding(self, table: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Show the LLM's embedding an id that it has in the place of an added word."""
        rows = self.rows_of(args[0])
        ids = args[0].masked_fill(rows >= 0, 0)
        ids.rows_of_words = rows  # for the hook after the module, which is handed this very tensor
        return ids, *args[1:]

    def _after_embedding(self, table: nn.Module, args: tuple[Any, ...], embedded: Tensor) -> Tensor:
        """Put the embeddings of added words into ``(..., D)``."""
        rows = args[0].rows_of_words
        own = self.input(rows.clamp(min=0)).to(embedded.dtype)
        return torch.where((rows >= 0).unsqueeze(-1), own, embedded)

    def _after_head(self, head: nn.Module, args: tuple[Any, ...], logits: Tensor) -> Tensor:
        """Put the logits of added words into ``(..., V)``, widened up to the last of them; ids of nothing get none."""
        own = self.output(args[0].to(self.output.weight.dtype)).to(logits.dtype)  # (..., n)
        more = max(0, max(self.ids) + 1 - logits.shape[-1])
        wide = pad(logits, (0, more), value=torch.finfo(logits.dtype).min)
        return wide.index_copy(-1, torch.tensor(self.ids, device=logits.device), own)


def _start_near(rows: Tensor, own: Tensor) -> None:
    """Fill rows ``(n, D)`` with the mean of the LLM's own ``(m, D)`` and a little noise."""
    own = own.detach().float()
    noise = torch.randn(rows.shape) * NOISE
    rows.copy_(own.mean(0) + noise.to(own.device) * own.std(0))


def checked_words(words: Mapping[str, int], taken: Mapping[str, int]) -> dict[str, int]:
    """Return new words with their token ids, if they collide with nothing.

    Args:
        words: token id by new word. taken: token ids that placeholders and earlier words have, by name.

    Raises:
        UserError: no word, a word or an id that is there already, or one id twice.
    """
    if not words:
        raise UserError("no words are given to add; expected {word: token id}, as add_to_tokenizer makes them")
    names = {token_id: name for name, token_id in taken.items()}
    for word, token_id in words.items():
        if word in taken:
            raise UserError(f"the word {word!r} was added before, with id {taken[word]}; leave it out")
        if token_id in names:
            raise UserError(
                f"the word {word!r} has the id {token_id} of {names[token_id]!r}; add words to the tokenizer with "
                "AVProcessor.add_words, which gives them ids after all others"
            )
        names[token_id] = word
    return dict(words)


def needed_words(description: ModelConfig) -> list[str]:
    """Return the words that the parts of a model need added: its time codec's."""
    codec: TimeCodec = build("time_codecs", description.time_codec)
    return codec.words()


def load_words(tokenizer: PreTrainedTokenizerBase, description: ModelConfig) -> dict[str, int]:
    """Return the token ids of the :func:`needed_words`, from a tokenizer of ``load_tokenizer``."""
    return {word: int(tokenizer.convert_tokens_to_ids(word)) for word in needed_words(description)}  # type: ignore[arg-type]


def add_to_tokenizer(tokenizer: PreTrainedTokenizerBase, words: Iterable[str]) -> dict[str, int]:
    """Add words to a tokenizer, after all of its ids, and return their ids.

    Raises:
        UserError: the tokenizer has one of them already, so that its row is the LLM's own.
    """
    words = list(words)
    known = tokenizer.get_vocab()
    old = [word for word in words if word in known]
    if old:
        raise UserError(
            f"the LLM's tokenizer has the word {old[0]!r} already (id {known[old[0]]}); "
            "choose words that it does not have"
        )
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])
    return {word: int(tokenizer.convert_tokens_to_ids(word)) for word in words}  # type: ignore[arg-type]


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, words: Mapping[str, int]) -> None:
    """Make sure that a tokenizer gives a model's added words the ids that the model has for them.

    Raises:
        UserError: it does not.
    """
    vocabulary = tokenizer.get_vocab() if words else {}
    for word, token_id in words.items():
        seen = vocabulary.get(word)
        if seen != token_id:
            raise UserError(
                f"the tokenizer has {word!r} as id {seen}, the model was given id {token_id}; take the tokenizer "
                "that the words were added to (AVProcessor.add_words)"
            )
