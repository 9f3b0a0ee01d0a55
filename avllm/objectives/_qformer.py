"""Share what BLIP-2's three terms need: the Q-Former that reads text, its parts, their texts."""

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
from avllm.precision import at_least_float32

if TYPE_CHECKING:
    from avllm.data.collate import Batch, Places


class Words(NamedTuple):
    """Hold texts as token ids.

    Attributes:
        ids: ``(n, L)`` long, L >= 1.
        mask: ``(n, L)`` bool.
    """

    ids: Tensor
    mask: Tensor

    def pick(self, index: Tensor) -> Words:
        """Return the texts at an index ``(k,)``."""
        return Words(self.ids[index], self.mask[index])


class Units(NamedTuple):
    """Hold the frames, windows or clips that a Q-Former's queries read one at a time.

    Attributes:
        x: ``(K, M, D)`` of all clips of the batch.
        keep: ``(K, M)`` bool, the real tokens.
        clip: ``(K,)`` the clip of each.
        sets: the clips of each set, see :class:`~avllm.data.collate.BatchParts`.
    """

    x: Tensor
    keep: Tensor
    clip: Tensor
    sets: Places


class QFormerTerm(Objective):
    """Compute a term on a Q-Former with a text side (its option ``text``).

    Targets are the parts that have the Q-Former's stream and an answer, which is the text. Where
    the Q-Former reads per frame or per window, a clip has several units: logits are averaged over
    units, and the similarity of a clip is that of the best query of any unit.

    Args:
        model: an AVLLM; the place of the Q-Former and the tokenizer's size are checked. The other
            arguments are those of
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
        self.source = self.stream.partition(".")[0]
        self.captions_only = captions_only
        self.max_length = max_length
        if self.source not in model.encoders:
            raise ValueError(
                f"the Q-Former reads stream {self.stream!r}, which adapters make; expected one of "
                f"{sorted(model.encoders)}, the encoders' streams, by which parts are counted"
            )
        text = self.side(model)
        if not 0 < max_length < text.longest:
            raise ValueError(
                f"max_length is {max_length}; expected 1 to {text.longest - 1}, the number of "
                "places that the Q-Former has for tokens"
            )
        self.tokenizer = load_tokenizer(tokenizer, text.vocabulary)

    def qformer(self, model: Any) -> QFormer:
        """Return the connector's Q-Former; as an attribute it would be saved twice."""
        return model.connector.adapters[self.place]

    def side(self, model: Any) -> QFormerText:
        """Return the Q-Former's text side."""
        text = self.qformer(model).text
        assert text is not None
        return text

    def chosen(self, batch: Batch) -> Tensor:
        """Return the parts that are targets, ``(n,)`` bool."""
        with_media = batch.parts.has_target & has_stream(batch, self.source)
        return with_media & chosen_parts(batch, self.captions_only)

    def weight(self, batch: Batch) -> float:
        """Count the parts that are targets."""
        return float(self.chosen(batch).sum())

    def words(self, batch: Batch, chosen: Tensor) -> Words:
        """Return the texts of the chosen parts."""
        if self.tokenizer is None:
            ids, mask = answer_tokens(batch, chosen)  # (k, M)
            return Words(ids[:, : self.max_length], mask[:, : self.max_length])
        texts: list[list[int]] = []
        for part, is_chosen in zip(batch.parts.items, chosen.tolist(), strict=True):
            if is_chosen:
                texts.append(self._tokenize(part.target))
        longest = max([1, *map(len, texts)])
        ids = torch.zeros(len(texts), longest, dtype=torch.long)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for row, tokens in enumerate(texts):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = True
        return Words(ids.to(chosen.device), mask.to(chosen.device))

    def _tokenize(self, text: str) -> list[int]:
        """Return a text's ids and the end token ([SEP] in BLIP-2); the Q-Former adds the first."""
        assert self.tokenizer is not None
        end = self.tokenizer.sep_token_id
        if end is None:
            end = self.tokenizer.eos_token_id
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [*ids[: self.max_length - 1], end]

    def embed(self, model: Any, words: Words, begin: int) -> Text:
        """Embed texts as the Q-Former's input after the queries, ``(n, 1 + L, D)``.

        Args:
            model: an AVLLM.
            words: the n texts.
            begin: kind of the first token, ``READ`` or ``WRITE``.
        """
        text = self.side(model)
        if text.vocabulary is not None:
            return text.embed(words.ids, words.mask, begin)
        return text.embed(model.llm.get_input_embeddings()(words.ids), words.mask, begin)

    def units(self, model: Any, batch: Batch) -> Units:
        """Return the units that the Q-Former reads; none where no clip has its stream."""
        qformer = self.qformer(model)
        tokens = model.media_steps(batch)[self.place].get(self.stream)
        if tokens is None:
            x = next(qformer.parameters()).new_zeros(0, 1, qformer.in_dim)
            keep = x.new_ones(0, 1, dtype=torch.bool)
            clip = batch.labels.new_zeros(0)
        else:
            x, keep, clip = qformer.units(tokens)
        return Units(x, keep, clip, batch.parts.set_clips)

    def similarity(self, model: Any, batch: Batch, chosen: Tensor) -> tuple[Tensor, int]:
        """Compare the media of this process's parts with the texts of all processes.

        It is BLIP-2's measure: the cosine of the text's first output, read without media, and the
        query output that is most similar to it.

        Args:
            model, batch: as an objective gets them.
            chosen: ``(n,)`` bool, k of them True.

        Returns:
            ``(k, K)`` with gradients, and the place of this process's first part among the K of
            all.
        """
        text = self.side(model)
        embedded = self.embed(model, self.words(batch, chosen), READ)  # (k, 1 + L, D)
        read = self.qformer(model).read_text(embedded)[:, 0]  # (k, D)
        projected = F.normalize(at_least_float32(text.text_projection(read)), dim=-1)  # (k, E)
        texts, first = gather_with_grad(projected)  # (K, E)
        tokens = model.media_steps(batch)[self.place + 1].get(self.stream)
        if tokens is None:
            return texts.new_zeros(0, len(texts)) + 0.0 * texts.sum(), first
        streams = {self.stream: tokens}
        outputs, real = tokens_by_clip_set(streams, batch.parts.set_clips)  # (S, M, D), (S, M)
        sets = batch.parts.clip_set[chosen]  # (k,)
        queries = at_least_float32(text.query_projection(outputs[sets]))  # (k, M, E)
        queries = F.normalize(queries, dim=-1)
        cosines = torch.einsum("nme,te->ntm", queries, texts)  # (k, K, M)
        cosines = cosines.masked_fill(~real[sets][:, None], -1.0)
        return cosines.amax(-1), first


def readings_of(media: Tensor, units: Units) -> tuple[Tensor, Tensor]:
    """List the readings of p pairs of media and text: the Q-Former reads each unit of a pair once.

    Args:
        media: ``(p,)`` the set of clips of each pair.
        units: of all clips.

    Returns:
        the pair and the unit of each of k readings, ``(k,)`` each.
    """
    sets = units.sets
    numbers = torch.cat([units.clip, sets.at])
    clips = int(numbers.max()) + 1 if len(numbers) else 1
    in_set = torch.zeros(sets.count, clips, dtype=torch.bool, device=media.device)
    in_set[sets.owner, sets.at] = True  # (S, B)
    pair, unit = in_set[media][:, units.clip].nonzero().unbind(1)
    return pair, unit


def mean_by_pair(x: Tensor, pair: Tensor, count: int) -> Tensor:
    """Average ``x (k, ...)`` over the readings of each pair, ``(count, ...)``; zero without any."""
    total = x.new_zeros(count, *x.shape[1:]).index_add(0, pair, x)
    number = pair.bincount(minlength=count).clamp(min=1).view(-1, *[1] * (x.dim() - 1))
    return total / number


def gather_words(words: Words) -> tuple[Words, int]:
    """Return the texts of all processes in rank order, and the place of this process's first."""
    length = words.ids.shape[1]
    longest = max(gather_sizes(length, words.ids.device))
    marked = words.ids.masked_fill(~words.mask, -1)  # the mask travels as -1 in the ids
    marked = F.pad(marked, (0, longest - length), value=-1)  # (n, longest)
    ids, first = gather_with_grad(marked)  # (N, longest)
    return Words(ids.clamp(min=0), ids >= 0), first


def find_qformer(model: Any, stream: str | None) -> int:
    """Return the place in the connector of the Q-Former that reads text.

    Args:
        model: an AVLLM.
        stream: of the Q-Former; None: of any.

    Raises:
        ValueError: there is none, or there are several.
    """
    stream_by_place: dict[int, str] = {}
    for place, adapter in enumerate(model.connector.adapters):
        if isinstance(adapter, QFormer) and adapter.text is not None:
            stream_by_place[place] = adapter.stream
    places = [place for place, name in stream_by_place.items() if stream in (None, name)]
    if len(places) != 1:
        described = [f"connector[{place}] on {name!r}" for place, name in stream_by_place.items()]
        raise ValueError(
            f"objectives: {len(places)} Q-Formers with a text side on stream {stream or 'any'} "
            f"(there are: {', '.join(described) or 'none'}); expected one: give the connector's "
            "qformer text: llm, and the objective its stream"
        )
    return places[0]


def load_tokenizer(name: str | None, vocabulary: int | None) -> Any:
    """Load the tokenizer of a vocabulary; return None for the LLM's, whose tokens the batch holds.

    Raises:
        ValueError: a name without a vocabulary or the other way round, or one that does not fit.
    """
    if (name is None) != (vocabulary is None):
        raise ValueError(
            f"objectives: tokenizer is {name!r} and the Q-Former's text is {vocabulary or 'llm'}; "
            "expected a tokenizer for a separate vocabulary, and none for the LLM's"
        )
    if name is None:
        return None
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    if len(tokenizer) > (vocabulary or 0):
        raise ValueError(
            f"objectives: tokenizer {name!r} has {len(tokenizer)} tokens, "
            f"the Q-Former's text {vocabulary}; expected as many or fewer"
        )
    if tokenizer.sep_token_id is None and tokenizer.eos_token_id is None:
        raise ValueError(
            f"objectives: tokenizer {name!r} has neither sep nor eos; expected one to end texts"
        )
    return tokenizer
