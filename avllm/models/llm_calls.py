"""Call the LLM: with media, in training and in answers, and on text alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
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
    """The methods of an AVLLM that call its LLM, with the fusion active where a batch has media."""

    llm: Any
    fusion: Fusion | None

    if TYPE_CHECKING:  # methods of AVLLM that are called from here

        def visible(self, batch: Batch, tokens: dict[str, Tokens] | None = None) -> Batch: ...

        def media_tokens(self, batch: Batch) -> dict[str, Tokens]: ...

        def shared_media(self) -> AbstractContextManager[None]: ...

        def merge_media(
            self, input_ids: Tensor, streams: dict[str, Tokens], batch: Batch | None
        ) -> Tensor: ...

    def run_llm(
        self, embeds: Tensor, batch: Batch, keep: Tensor | None = None
    ) -> CausalLMOutputWithPast:
        """Run the LLM on embedded rows ``(R, L, D)``, with the batch's mask, positions and packing.

        Args:
            embeds: ``(R, L, D)``.
            batch: the rows.
            keep: positions ``(K,)`` whose logits are computed; None for all.
        """
        with self.beside_llm(batch):
            inputs = llm_inputs(self.llm.config, embeds, self.visible(batch))
            if keep is not None:
                inputs["logits_to_keep"] = keep
            return self.llm(**inputs)

    def run_decoder(self, embeds: Tensor, batch: Batch) -> Tensor:
        """Return the last hidden states ``(R, L, D)`` of embedded rows, without the LLM's head.

        Losses that need logits at few positions apply the head to these positions alone.
        """
        with self.beside_llm(batch):
            inputs = llm_inputs(self.llm.config, embeds, self.visible(batch))
            return self.llm.get_decoder()(**inputs).last_hidden_state

    @contextmanager
    def beside_llm(
        self, batch: Batch | None, tokens: dict[str, Tokens] | None = None
    ) -> Iterator[None]:
        """Let the fusion, if there is one, act on the LLM's calls in this block.

        Every call with media is made inside of such a block.

        Args:
            batch: the rows that are read; None for text alone, on which the fusion does not act.
            tokens: the connector's output, ``(B, T, P, D)`` each; None computes it from the batch.
        """
        if self.fusion is None:
            yield
            return
        if tokens is None and batch is not None and batch.streams:
            tokens = self.media_tokens(batch)
        prepared = None
        if tokens and batch is not None:
            prepared = self.fusion.prepare(tokens, batch)
        opener = partial(self.fusion.context, self.llm, prepared)
        before = _OPEN.set(opener)
        try:
            with opener():
                yield
        finally:
            _OPEN.reset(before)

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the LLM's last hidden states ``(R, L, D)`` on bare text, for text embeddings."""
        decoder = self.llm.get_decoder()
        mask = attention_mask.long()
        with self.beside_llm(None):
            output = decoder(input_ids=input_ids, attention_mask=mask, use_cache=False)
        return output.last_hidden_state

    def head_is_plain(self) -> bool:
        """Return True if single logits can be computed: the head applied to the last states."""
        with self.beside_llm(None):
            return head_is_plain(self.llm)

    @torch.no_grad()
    def prefill(self, embeds: Tensor, batch: Batch, tokens: dict[str, Tokens]) -> CachedRows:
        """Read embedded rows into a cache, to which further tokens are added.

        Args:
            embeds: ``(R, L, D)``, padded on the left.
            batch: the rows.
            tokens: the connector's output for the batch's clips.
        """
        return CachedRows(self, batch, tokens, embeds)

    @torch.no_grad()
    def generate(self, batch: Batch, *, decoder: Decoder | None = None, **kwargs: Any) -> Tensor:
        """Answer a batch of prompts, greedily by default.

        Args:
            batch: rows that end where the answer begins, collated with ``padding_side="left"``.
            decoder: changes the logits of each step.
            kwargs: of transformers' ``generate`` (``max_new_tokens``, ``do_sample``, ...).

        Returns:
            ``(R, new tokens)`` long.
        """
        processors = list(kwargs.get("logits_processor") or [])
        with self.shared_media():
            tokens = self.media_tokens(batch)
            if decoder is not None:
                processors += decoder.processors(self, batch)
        kwargs["logits_processor"] = LogitsProcessorList(processors)
        with self.beside_llm(batch, tokens):
            return self.llm.generate(
                inputs_embeds=self.merge_media(batch.input_ids, tokens, batch),
                attention_mask=self.visible(batch, tokens).attention_mask.long(),
                **{"do_sample": False, "max_new_tokens": 256, **kwargs},
            )

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Recompute the LLM's layers in the backward pass, with the forward's fusion and LoRA sets.

        Args:
            gradient_checkpointing_kwargs: of torch's ``checkpoint``.
            kwargs: of the LLM's method, passed on.
        """
        settings = {"use_reentrant": False, "context_fn": partial(recompute_contexts, self.llm)}
        settings |= gradient_checkpointing_kwargs or {}
        self.llm.gradient_checkpointing_enable(settings, **kwargs)


def recompute_contexts(llm: Any) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return the contexts of a checkpointed call and of its recomputation, for torch's checkpoint.

    With gradient checkpointing, layers run a second time in the backward pass, after the contexts
    of the forward pass have ended: without them, gradients would be those of another function.
    """
    return nullcontext(), _Reopened(_OPEN.get(), ActiveSets(llm, active_sets(llm)))


class _Reopened(AbstractContextManager[None]):
    """Opens the contexts of the forward pass again, as often as layers are recomputed."""

    def __init__(self, opener: Opener | None, sets: ActiveSets) -> None:
        self.opener = opener
        self.sets = sets
        self.stacks: list[ExitStack] = []

    def __enter__(self) -> None:
        stack = ExitStack()
        stack.enter_context(self.sets)
        if self.opener is not None:
            stack.enter_context(self.opener())
        self.stacks.append(stack)

    def __exit__(self, *error: Any) -> None:
        self.stacks.pop().__exit__(*error)


class CachedRows:
    """R rows in the LLM's cache.

    Made by :meth:`LLMCalls.prefill`. Rows are padded on the left, so that each row's last token is
    in the last column.

    Attributes:
        logits: ``(R, V)`` after the last token of each row.
    """

    def __init__(self, model: Any, batch: Batch, tokens: dict[str, Tokens], embeds: Tensor) -> None:
        self.model = model
        self.batch = batch
        self.tokens = tokens
        self.mask = batch.attention_mask[:, :0]  # (R, 0)
        self.cache: Any = None
        real = model.visible(batch, tokens).attention_mask  # (R, L)
        self.logits = self._read(real, inputs_embeds=embeds)

    def extend(self, input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Read further tokens and return the logits ``(R, V)`` after the last.

        Args:
            input_ids: ``(R, N)``, padded on the left.
            mask: ``(R, N)`` bool, False for padding; None if all tokens are real.
        """
        real = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask
        self.logits = self._read(real, input_ids=input_ids)
        return self.logits

    def select(self, owner: Tensor, batch: Batch, clips: Tensor) -> None:
        """Replace the rows by a selection of them, in which a row may occur several times.

        Args:
            owner: ``(R',)`` long, the present index of each new row.
            batch: the new rows, with their clips' places.
            clips: ``(B',)`` long, the present index of each new clip.
        """
        self.cache.batch_select_indices(owner)
        self.mask = self.mask[owner]
        self.batch = batch
        self.tokens = {name: tokens.select(clips) for name, tokens in self.tokens.items()}

    def _read(self, real: Tensor, **inputs: Tensor) -> Tensor:
        """Read tokens (``real (R, N)`` is False for padding); return the last logits ``(R, V)``."""
        count = self.mask.sum(1, keepdim=True)  # (R, 1), real tokens of each row in the cache
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
    """Return True if rows of the LLM's cache can be selected: no sliding windows, no states."""
    layers = DynamicCache(config=llm.config.get_text_config()).layers
    return all(type(layer) is DynamicLayer for layer in layers)
