"""BLIP-2's three terms share this: the Q-Former of the connector that reads text, the parts it has, and their texts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from avllm.adapters._qformer_text import READ, QFormerText, Text
from avllm.adapters.qformer import QFormer
from avllm.distributed import gather_sizes, gather_with_grad
from avllm.objectives._pairs import chosen_parts, has_stream, tokens_by_clip_set
from avllm.objectives._text import answer_tokens
from avllm.objectives.base import Objective

if TYPE_CHECKING:
    from avllm.data.collate import Batch, Places


class Words(NamedTuple):
    """Texts as token ids.

    Attributes:
        ids: ``(n, L)`` long, L >= 1. mask: ``(n, L)`` bool.
    """

    ids: Tensor
    mask: Tensor

    def pick(self, index: Tensor) -> Words:
        """The texts of an index ``(k,)``."""
        return Words(self.ids[index], self.mask[index])


class Units(NamedTuple):
    """The frames, windows or clips that a Q-Former's queries read one at a time, of all clips of the batch.

    Attributes:
        x: ``(K, M, D)``. keep: ``(K, M)`` bool. clip: ``(K,)`` the clip of each.
        sets: the clips of each set, see :class:`~avllm.data.collate.BatchParts`.
    """

    x: Tensor
    keep: Tensor
    clip: Tensor
    sets: Places


class QFormerTerm(Objective):
    """A term on a Q-Former with a text side (its option ``text``), and on the parts that have its stream and an answer.

    The answer is the text. Per frame or per window, a clip has several units; what the Q-Former says of each is
    averaged: logits over units, similarities by the best query of any.

    Args:
        model: an AVLLM; the place of the Q-Former and the tokenizer's size are checked here. The others stand in
            :class:`~avllm.objectives.qformer_contrastive.QFormerContrastive`.
    """

    def __init__(
        self,
        model: Any,
        *,
        stream: str | None = None,
        tokenizer: str | None = None,
        max_length: int = 64,
        captions_only: bool = False,
    ) -> None:
        super().__init__(model)
        self.place = find_qformer(model, stream)
        self.stream = self.qformer(model).stream
        self.source, self.captions_only, self.max_length = self.stream.partition(".")[0], captions_only, max_length
        if self.source not in model.encoders:
            raise ValueError(
                f"the Q-Former reads stream {self.stream!r}, which adapters make; parts are counted by an encoder's "
                f"stream before they run, so expected one of {sorted(model.encoders)}"
            )
        text = self.side(model)
        if not 0 < max_length < text.longest:
            raise ValueError(f"max_length is {max_length}; expected 1 to {text.longest - 1}, for so many places it has")
        self.tokenizer = load_tokenizer(tokenizer, text.vocabulary)

    def qformer(self, model: Any) -> QFormer:
        """The Q-Former; it stays the connector's."""
        return model.connector.adapters[self.place]

    def side(self, model: Any) -> QFormerText:
        """Its text side."""
        text = self.qformer(model).text
        assert text is not None
        return text

    def chosen(self, batch: Batch) -> Tensor:
        """Return the parts that are counted, ``(n,)`` bool."""
        with_media = batch.parts.has_target & has_stream(batch, self.source)
        return with_media & chosen_parts(batch, self.captions_only)

    def weight(self, batch: Batch) -> float:
        """Count these parts."""
        return float(self.chosen(batch).sum())

    def words(self, batch: Batch, chosen: Tensor) -> Words:
        """Return the texts of the chosen parts."""
        if self.tokenizer is None:
            ids, mask = answer_tokens(batch, chosen)  # (k, M)
            return Words(ids[:, : self.max_length], mask[:, : self.max_length])
        pairs = zip(batch.parts.items, chosen.tolist(), strict=True)
        texts = [self._tokenize(part.target) for part, keep in pairs if keep]
        ids = torch.zeros(len(texts), max([1, *map(len, texts)]), dtype=torch.long)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for i, tokens in enumerate(texts):
            ids[i, : len(tokens)] = torch.tensor(tokens)
            mask[i, : len(tokens)] = True
        return Words(ids.to(chosen.device), mask.to(chosen.device))

    def _tokenize(self, text: str) -> list[int]:
        """Ids with the end in the end ([SEP] in BLIP-2); the beginning is the Q-Former's business."""
        assert self.tokenizer is not None
        end = self.tokenizer.sep_token_id if self.tokenizer.sep_token_id is not None else self.tokenizer.eos_token_id
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*ids[: self.max_length - 1], end]

    def embed(self, model: Any, words: Words, begin: int) -> Text:
        """Words -> what stands behind the queries, ``(n, 1 + L, D)``."""
        text = self.side(model)
        given = words.ids if text.vocabulary is not None else model.llm.get_input_embeddings()(words.ids)
        return text.embed(given, words.mask, begin)

    def units(self, model: Any, batch: Batch) -> Units:
        """Return what the Q-Former reads of the batch; nothing where no clip has its stream."""
        tokens = model.media_steps(batch)[self.place].get(self.stream)
        if tokens is None:
            x = next(self.qformer(model).parameters()).new_zeros(0, 1, self.qformer(model).in_dim)
            return Units(x, x.new_ones(0, 1, dtype=torch.bool), batch.labels.new_zeros(0), batch.parts.set_clips)
        x, keep, clip = self.qformer(model).units(tokens)
        return Units(x, keep, clip, batch.parts.set_clips)

    def similarity(self, model: Any, batch: Batch, chosen: Tensor) -> tuple[Tensor, int]:
        """Compare the media of this process's parts with the texts of all processes.

        BLIP-2's measure: cosine of the text's first output, read by itself, and the query output that is most like it.

        Args:
            chosen: ``(n,)`` bool, k of them True.

        Returns:
            ``(k, K)`` with gradients, and the place of this process's first part among the K of all.
        """
        text = self.side(model)
        read = self.qformer(model).read_text(self.embed(model, self.words(batch, chosen), READ))[:, 0]  # (k, D)
        texts, first = gather_with_grad(F.normalize(text.text_projection(read).float(), dim=-1))  # (K, E)
        tokens = model.media_steps(batch)[self.place + 1].get(self.stream)
        if tokens is None:
            return texts.new_zeros(0, len(texts)) + 0.0 * texts.sum(), first
        made, real = tokens_by_clip_set({self.stream: tokens}, batch.parts.set_clips)  # (S, M, D), (S, M)
        sets = batch.parts.clip_set[chosen]  # (k,)
        queries = F.normalize(text.query_projection(made[sets]).float(), dim=-1)  # (k, M, E)
        like = torch.einsum("nme,te->ntm", queries, texts).masked_fill(~real[sets][:, None], -1.0)  # (k, K, M)
        return like.amax(-1), first


def pairs_of(media: Tensor, units: Units) -> tuple[Tensor, Tensor]:
    """List the units that each of p pairs of media and a text reads.

    Args:
        media: ``(p,)`` the set of clips of each pair.

    Returns:
        ``(k,)`` each, the pair and the unit of every reading that the pairs take.
    """
    sets = units.sets
    numbers = torch.cat([units.clip, sets.at])
    clips = int(numbers.max()) + 1 if len(numbers) else 1
    in_set = torch.zeros(sets.count, clips, dtype=torch.bool, device=media.device)
    in_set[sets.owner, sets.at] = True  # (S, B)
    pair, unit = in_set[media][:, units.clip].nonzero().unbind(1)
    return pair, unit


def mean_by_pair(x: Tensor, pair: Tensor, count: int) -> Tensor:
    """``(k, ...)`` of the readings -> ``(count, ...)``, the mean of each pair's; zero where it has none."""
    total = x.new_zeros(count, *x.shape[1:]).index_add(0, pair, x)
    number = pair.bincount(minlength=count).clamp(min=1).view(-1, *[1] * (x.dim() - 1))
    return total / number


def gather_words(words: Words) -> tuple[Words, int]:
    """The texts of all processes, in rank order, and the place of this process's first."""
    width = max(gather_sizes(words.ids.shape[1], words.ids.device))
    marked = F.pad(words.ids.masked_fill(~words.mask, -1), (0, width - words.ids.shape[1]), value=-1)  # (n, L)
    ids, first = gather_with_grad(marked)  # (N, L)
    return Words(ids.clamp(min=0), ids >= 0), first


def find_qformer(model: Any, stream: str | None) -> int:
    """The place in the connector of the Q-Former that reads text.

    Raises:
        ValueError: there is none, or there are several.
    """
    having = [
        (place, adapter.stream)
        for place, adapter in enumerate(model.connector.adapters)
        if isinstance(adapter, QFormer) and adapter.text is not None
    ]
    found = [place for place, name in having if stream in (None, name)]
    if len(found) != 1:
        seen = ", ".join(f"connector[{place}] on {name!r}" for place, name in having) or "none"
        raise ValueError(
            f"objectives: {len(found)} Q-Formers with a text side on stream {stream or 'any'} (there are: {seen}); "
            "expected one: give the qformer in the connector text: llm, and the objective its stream"
        )
    return found[0]


def load_tokenizer(name: str | None, vocabulary: int | None) -> Any:
    """The tokenizer of a vocabulary; None for the LLM's tokens, which the batch holds.

    Raises:
        ValueError: a name without a vocabulary or the other way round, or one that does not fit.
    """
    if (name is None) != (vocabulary is None):
        raise ValueError(
            f"objectives: tokenizer is {name!r} and the Q-Former's text is {vocabulary or 'llm'}; expected a tokenizer "
            "for a vocabulary of its own, and none for the LLM's"
        )
    if name is None:
        return None
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)
    if len(tokenizer) > (vocabulary or 0):
        raise ValueError(
            f"objectives: tokenizer {name!r} has {len(tokenizer)} tokens, the Q-Former's text {vocabulary}; "
            "expected as many or fewer"
        )
    if tokenizer.sep_token_id is None and tokenizer.eos_token_id is None:
        raise ValueError(f"objectives: tokenizer {name!r} has neither sep nor eos; expected one, with which texts end")
    return tokenizer
