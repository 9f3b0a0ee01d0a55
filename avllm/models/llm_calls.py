"""Every call of the LLM: with media, in training and in answers, and on text alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from avllm.data.collate import Batch
from avllm.decoders.base import Decoder
from avllm.fusions.base import Fusion
from avllm.models.attention import llm_inputs
from avllm.models.llm import head_is_plain
from avllm.models.lora import ActiveSets, active_sets
from avllm.tokens import Tokens

Opener = Callable[[], AbstractContextManager[None]]
_OPEN: ContextVar[Opener | None] = ContextVar("beside_llm", default=None)


class LLMCalls:
    """The part of an AVLLM that calls its LLM, with the fusion at work where there are media."""

    llm: Any
    fusion: Fusion | None

    if TYPE_CHECKING:  # what the rest of the model offers

        def visible(self, batch: Batch, tokens: dict[str, Tokens] | None = None) -> Batch: ...

        def media_tokens(self, batch: Batch) -> dict[str, Tokens]: ...

        def shared_media(self) -> AbstractContextManager[None]: ...

        def merge_media(self, input_ids: Tensor, streams: dict[str, Tokens], batch: Batch | None) -> Tensor: ...

    def run_llm(self, embeds: Tensor, batch: Batch, keep: Tensor | None = None) -> CausalLMOutputWithPast:
        """The LLM on embedded rows ``(R, L, D)``, with the batch's mask, positions and packing."""
        wanted = {} if keep is None else {"logits_to_keep": keep}
        with self.beside_llm(batch):
            return self.llm(**llm_inputs(self.llm.config, embeds, self.visible(batch)), **wanted)

    def run_decoder(self, embeds: Tensor, batch: Batch) -> Tensor:
        """The same without the head: last hidden states ``(R, L, D)``, for losses that need logits at few places."""
        with self.beside_llm(batch):
            return self.llm.get_decoder()(**llm_inputs(self.llm.config, embeds, self.visible(batch))).last_hidden_state

    @contextmanager
    def beside_llm(self, batch: Batch | None, tokens: dict[str, Tokens] | None = None) -> Iterator[None]:
        """Let the fusion, where there is one, act on the LLM's calls within: every call with media goes through here.

        Args:
            batch: the rows that are read; None for text alone, which the fusion must not touch.
            tokens: the connector's output, ``(B, T, P, D)`` each; None takes that of the batch.
        """
        if self.fusion is None:
            yield
            return
        if tokens is None and batch is not None and batch.streams:
            tokens = self.media_tokens(batch)
        prepared = self.fusion.prepare(tokens, batch) if tokens and batch is not None else None
        opener = partial(self.fusion.context, self.llm, prepared)
        before = _OPEN.set(opener)
        try:
            with opener():
                yield
        finally:
            _OPEN.reset(before)

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Last hidden states ``(R, L, D)`` of the LLM on bare text, for text embeddings."""
        decoder = self.llm.get_decoder()
        with self.beside_llm(None):
            out = decoder(input_ids=input_ids, attention_mask=attention_mask.long(), use_cache=False)
        return out.last_hidden_state

    def head_is_plain(self) -> bool:
        """Return whether logits are the LLM's head applied to its last hidden states, so that few may be computed."""
        with self.beside_llm(None):
            return head_is_plain(self.llm)

    @torch.no_grad()
    def prefill(self, embeds: Tensor, batch: Batch, tokens: dict[str, Tokens]) -> CachedRows:
        """Read embedded rows ``(R, L, D)``, padded on the left, into a cache to which further tokens are added.

        Args:
            tokens: the connector's output for the batch's clips.
        """
        return CachedRows(self, batch, tokens, embeds)

    @torch.no_grad()
    def generate(self, batch: Batch, *, decoder: Decoder | None = None, **kwargs: Any) -> Tensor:
        """Answer a batch of prompts (collated with ``padding_side="left"``), greedily where nothing else is given.

        Args:
            batch: rows that end where the answer begins.
            decoder: changes the logits of each step.
            kwargs: of transformers' ``generate``: ``max_new_tokens``, ``do_sample``, ``streamer``, ...

        Returns:
            ``(R, new tokens)`` long.
        """
        with self.shared_media():
            tokens = self.media_tokens(batch)
            processors = decoder.processors(self, batch) if decoder is not None else []
        kwargs["logits_processor"] = LogitsProcessorList([*(kwargs.get("logits_processor") or []), *processors])
        with self.beside_llm(batch, tokens):
            return self.llm.generate(
                inputs_embeds=self.merge_media(batch.input_ids, tokens, batch),
                attention_mask=self.visible(batch, tokens).attention_mask.long(),
                **{"do_sample": False, "max_new_tokens": 256, **kwargs},
            )

    def gradient_checkpointing_enable(  # type: ignore[override]
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None
    ) -> None:
        """Recompute the LLM's layers in the backward pass, with the fusion and the LoRA sets of the forward pass."""
        own = {"use_reentrant": False, "context_fn": partial(recompute_contexts, self.llm)}
        self.llm.gradient_checkpointing_enable(own | (gradient_checkpointing_kwargs or {}))


def recompute_contexts(llm: Any) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return the contexts of a checkpointed call and of its recomputation (``context_fn`` of torch's checkpoint).

    With gradient checkpointing, layers run a second time in the backward pass, when the contexts of the forward pass
    have been left: without them, gradients would be those of another function.
    """
    return nullcontext(), _as_now(_OPEN.get(), ActiveSets(llm, active_sets(llm)))


@contextmanager
def _as_now(opener: Opener | None, sets: ActiveSets) -> Iterator[None]:
    with sets, opener() if opener is not None else nullcontext():
        yield


class CachedRows:
    """R rows in the LLM's cache.

    Made by :meth:`LLMCalls.prefill`. Rows are padded on the left: each one's last token is the batch's last.

    Attributes:
        logits: ``(R, V)`` after the last token of each row.
    """

    def __init__(self, model: Any, batch: Batch, tokens: dict[str, Tokens], embeds: Tensor) -> None:
        self.model, self.batch, self.tokens = model, batch, tokens
        self.mask = batch.attention_mask[:, :0]  # (R, 0)
        self.cache: Any = None
        self.logits = self._read(model.visible(batch, tokens).attention_mask, inputs_embeds=embeds)

    def extend(self, input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Read further tokens ``(R, N)`` and return the logits ``(R, V)`` after the last.

        Args:
            mask: ``(R, N)`` bool where some are padding, which comes first in its row; None = all are real.
        """
        real = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask
        self.logits = self._read(real, input_ids=input_ids)
        return self.logits

    def select(self, owner: Tensor, batch: Batch, clips: Tensor) -> None:
        """Take rows ``owner (R',)`` in place of the present ones; a row may be taken several times.

        Args:
            batch: the new rows, with their clips' places. clips: ``(B',)`` long, the present number of each new clip.
        """
        self.cache.batch_select_indices(owner)
        self.mask, self.batch = self.mask[owner], batch
        self.tokens = {name: tokens.select(clips) for name, tokens in self.tokens.items()}

    def _read(self, real: Tensor, **inputs: Tensor) -> Tensor:
        """Read tokens ``(R, N)``, of which ``real (R, N)`` are no padding; returns the last logits ``(R, V)``."""
        count = self.mask.sum(1, keepdim=True)  # (R, 1), the tokens that each row has already
        self.mask = torch.cat([self.mask, real], dim=1)
        places = (count + real.cumsum(1) - 1).clamp(min=0)  # (R, N)
        with self.model.beside_llm(self.batch, self.tokens):
            out = self.model.llm(
                **inputs,
                attention_mask=self.mask.long(),
                position_ids=places,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self.cache = out.past_key_values
        logits: Tensor = out.logits[:, -1]
        return logits


def cache_is_selectable(llm: Any) -> bool:
    """Return whether rows of the LLM's cache can be taken several times: not so with sliding windows and states."""
    layers = DynamicCache(config=llm.config.get_text_config()).layers
    return all(type(layer) is DynamicLayer for layer in layers)
