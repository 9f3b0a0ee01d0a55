"""Compose the model: frozen encoders, a trainable connector, a causal LLM.

Letters of shapes, the same throughout the project:

    R rows of a batch, B clips in it, T time steps of a clip, P tokens of a step, N = T*P,
    L length of the LLM's sequence, D width, S waveform samples, V vocabulary,
    U units that an encoder takes in (frames, windows of sound). Masks are bool, True = real.

A batch passes ``encode_media`` (media -> timed features), ``connect`` (features -> tokens in the
LLM's space), ``merge_media`` (tokens -> their positions in the embedded text), then the LLM.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from avllm.adapters.base import Prompt, in_variant
from avllm.config_model import ModelConfig
from avllm.config_peft import LoraConfig, PeftConfig
from avllm.data.collate import Batch
from avllm.encoders.base import Encoder
from avllm.errors import UserError
from avllm.fusions.base import Fusion, build_fusion, consumed_streams
from avllm.models.asked import prompt_of
from avllm.models.building.adapter_config import add_record, set_of, settings_of
from avllm.models.configuration_avllm import AVConfig
from avllm.models.connector import Connector, bind_adapters, check_placeholders
from avllm.models.encoders import build_encoders, load_encoder, widths_of
from avllm.models.llm import is_quantised, load_llm
from avllm.models.llm_calls import LLMCalls
from avllm.models.lora import ActiveSets, activate, add_set, eval_frozen_sets, merge_sets
from avllm.models.merge import merge_media, surplus_places
from avllm.models.words import AddedWords, checked_words, needed_words
from avllm.tokens import StreamBatch, Tokens


class AVLLM(LLMCalls, PreTrainedModel):
    """An audio-visual language model of any encoders, adapters and causal LLM of transformers.

    ``AVLLM(config)`` builds all parts with random weights; :meth:`from_backbones` loads them by
    name; :meth:`from_pretrained` reads a checkpoint folder.

    Args:
        config: the parts.
        llm: the LLM; None to build it with random weights.
        encoders: the encoders by stream; None to build them with random weights.
    """

    config_class = AVConfig
    config: AVConfig
    llm: Any  # any causal LM of transformers, bare or wrapped by PEFT
    encoders: nn.ModuleDict
    connector: Connector
    fusion: Fusion | None
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_attention_backend = True

    def __init__(
        self,
        config: AVConfig,
        llm: PreTrainedModel | None = None,
        encoders: dict[str, Encoder] | None = None,
    ) -> None:
        super().__init__(config)
        self.llm = llm or AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**config.llm["config"]), trust_remote_code=False
        )
        parts: dict[str, Any] = encoders or build_encoders(config.encoders)
        # config.json sorts the streams: sorted here, their order is the same after a save.
        parts = dict(sorted(parts.items()))
        self.encoders = nn.ModuleDict(parts)
        llm_dim = self.llm.get_input_embeddings().weight.shape[-1]
        self.connector = Connector(config.connector, widths_of(parts), llm_dim)
        self.fusion = build_fusion(config.fusion, self.connector.widths, self.llm)
        check_placeholders(
            self.connector.out_streams, config.media_token_ids, consumed_streams(config.fusion)
        )
        if not hasattr(self.llm, "peft_config"):
            for name, record in config.lora.items():
                self.llm = add_set(self.llm, settings_of(name, record))
            activate(self.llm, config.active_lora)
        self.words: AddedWords | None = None
        if config.words:
            self.words = AddedWords.beside(self.llm, config.words)
        self.attach_words()
        self.generation_config = self.llm.generation_config
        self._shared: dict[Batch, list[dict[str, Tokens]]] | None = None
        bind_adapters(self)

    # ---- building ----------------------------------------------------------------------------

    @classmethod
    def from_backbones(
        cls,
        description: ModelConfig,
        media_token_ids: dict[str, int],
        words: Mapping[str, int] | None = None,
    ) -> AVLLM:
        """Load each backbone by its name in the description; the connector starts from scratch.

        Args:
            description: the ``model`` section of a preset.
            media_token_ids: placeholder ids by stream, from the processor.
            words: token ids of the words that time codec and adapters need, of :func:`load_words`.

        Raises:
            UnknownPartError: an unknown encoder, adapter or option.
            UserError: parts that do not fit together, or a name that is neither a folder nor on the
                hub.
        """
        missing = sorted(set(needed_words(description)) - set(words or {}))
        if missing:
            raise UserError(
                f"the model's parts need {len(missing)} added words ({missing[0]!r}, ...); give "
                "load_words' ids"
            )
        llm, llm_record = load_llm(description.llm)
        encoders: dict[str, Encoder] = {}
        records: dict[str, dict[str, Any]] = {}
        for stream, spec in description.encoders.items():
            encoders[stream], records[stream] = load_encoder(stream, spec)
        config = AVConfig.of(description, llm_record, records, media_token_ids)
        model = cls(config, llm=llm, encoders=encoders)
        for adapter in model.connector.adapters:
            adapter.load_init()
        if words:
            model.add_words(words)
        return model.freeze()

    def freeze(self) -> AVLLM:
        """Freeze encoders and LLM, except for LoRA; a stage's rules are applied after this."""
        self.encoders.requires_grad_(False)
        for name, parameter in self.llm.named_parameters():
            parameter.requires_grad_(set_of(name) is not None and parameter.is_floating_point())
        return self

    def add_lora(self, settings: LoraConfig | PeftConfig) -> AVLLM:
        """Put a named set of adapters on the LLM, of LoRA or of another method of PEFT.

        A copy replaces its source among the active sets.

        Raises:
            UserError: the LLM has a set of this name, or the settings do not fit it.
        """
        self.llm = add_set(self.llm, settings)
        add_record(self.config.lora, settings)
        activate(self.llm, self.config.active_lora)
        self.attach_words()
        return self

    def lora(self, names: Sequence[str]) -> ActiveSets:
        """Activate exactly these LoRA sets for a block; several add up, ``()`` is the bare LLM.

        After the block, also after an exception, the earlier sets are active again.
        ``requires_grad`` does not change. Backward passes may follow outside of the block: with
        gradient checkpointing, layers are recomputed with the sets of the forward pass.

        Raises:
            UserError: on entry, if the LLM has no set of a name.
        """
        return ActiveSets(self.llm, names)

    def merge_lora(self, names: Sequence[str] | None = None) -> AVLLM:
        """Add LoRA sets to the LLM's weights: answers are faster, checkpoints hold the whole LLM.

        Args:
            names: the sets; None for the active ones. The other sets are dropped: they were trained
                on the LLM without these.

        Raises:
            UserError: the LLM has no such set, or is quantised.
        """
        names = self.config.active_lora if names is None else list(names)
        if not names:
            raise UserError(
                f"no LoRA set to merge is given; the LLM has {list(self.config.lora) or 'none'}",
                reason="nothing_to_merge",
            )
        if is_quantised(self.llm):
            raise UserError(
                "the LLM is quantised, and adapters would be rounded into it; load it without "
                "quantize",
                reason="quantised",
            )
        self.llm = merge_sets(self.llm, names)
        self.config.lora, self.config.trained = {}, sorted({*self.config.trained, "llm"})
        self.attach_words()
        return self

    def add_words(self, words: Mapping[str, int]) -> AVLLM:
        """Add vocabulary entries that train (rule ``words.``) while the LLM's entries stay frozen.

        Args:
            words: token id by word, of ``AVProcessor.add_words`` or ``add_to_tokenizer``.

        Raises:
            UserError: the model has a word or an id already.
        """
        taken = {
            f"<|{name}|>": i for name, i in self.config.media_token_ids.items()
        } | self.config.words
        words = self.config.words | checked_words(words, taken)
        before = self.words
        if before is not None:
            before.detach()  # the new rows start from the LLM's alone
        self.words = AddedWords.beside(self.llm, words).to(self.device)
        if before is not None:
            self.words.take(before)
        self.config.words, self.config.trained = words, sorted({*self.config.trained, "words"})
        self.attach_words()
        return self

    def attach_words(self) -> None:
        """Register the hooks of added words, if there are any, on the LLM's embedding and head."""
        if self.words is not None:
            self.words.attach(self.llm)

    def train(self, mode: bool = True) -> AVLLM:
        """Set the mode as in torch, but keep frozen parts in eval mode: no dropout there.

        Parts are each encoder, each adapter of the connector, the fusion and each LoRA set. The LLM
        itself gets the mode: its gradient checkpointing reads it, and LLMs have no dropout.
        """
        super().train(mode)
        for part in [*self.encoders.values(), *self.connector, *filter(None, [self.fusion])]:
            if not any(p.requires_grad for p in part.parameters()):
                part.eval()
        eval_frozen_sets(self.llm)
        return self

    # ---- from a batch to logits ----------------------------------------------------------------

    def encode_media(self, streams: dict[str, StreamBatch]) -> dict[str, Tokens]:
        """Encode media to features ``{stream or stream.layer: (B, T, P, D)}``.

        A frozen encoder makes no graph.
        """
        features: dict[str, Tokens] = {}
        for name, batch in streams.items():
            encoder = cast(Encoder, self.encoders[name])
            trains = torch.is_grad_enabled() and any(p.requires_grad for p in encoder.parameters())
            with torch.set_grad_enabled(trains):
                layers = encoder.encode(batch)
            for layer, tokens in layers.items():
                features[f"{name}.{layer}" if layer else name] = tokens
        return features

    def connect(
        self, streams: dict[str, Tokens], prompt: Prompt | None = None
    ) -> dict[str, Tokens]:
        """Turn features into tokens in the LLM's space, ``{stream: (B, T', P', D)}``."""
        return self._connect_in_steps(streams, prompt)[-1]

    def _connect_in_steps(
        self, streams: dict[str, Tokens], prompt: Prompt | None
    ) -> list[dict[str, Tokens]]:
        dtype = next(self.connector.parameters()).dtype
        return self.connector.steps(
            {k: v.with_x(v.x.to(dtype)) for k, v in streams.items()}, prompt
        )

    def merge_media(
        self, input_ids: Tensor, streams: dict[str, Tokens], batch: Batch | None = None
    ) -> Tensor:
        """Embed text and media tokens: see :func:`avllm.models.merge.merge_media`."""
        return merge_media(
            self.llm.get_input_embeddings(), input_ids, self.config.media_token_ids, streams, batch
        )

    def visible(self, batch: Batch, tokens: dict[str, Tokens] | None = None) -> Batch:
        """Mask placeholders without a token: the LLM neither sees nor counts them.

        Args:
            tokens: the connector's output for the batch; None computes it.
        """
        if not self.connector.by_content:
            return batch
        if tokens is None:
            tokens = self.media_tokens(batch) if batch.streams else {}
        mask = batch.attention_mask & ~surplus_places(
            batch.input_ids, self.config.media_token_ids, tokens
        )  # (R, L)
        return replace(batch, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))

    def media_tokens(self, batch: Batch) -> dict[str, Tokens]:
        """Return the connector's output for a batch by stream, ``(B, T', P', D)``."""
        return self.media_steps(batch)[-1]

    def media_steps(self, batch: Batch) -> list[dict[str, Tokens]]:
        """Return the inputs of adapter 0, 1, ... for a batch, and the output of the last one.

        Objectives use it that run an adapter a second time, with the caption for example.
        """
        shared = self._shared  # read once: another thread may end its block meanwhile
        if shared is not None and batch in shared:
            return shared[batch]
        features = self.encode_media(batch.streams)
        steps = self._steps_for(batch, features)
        if shared is not None:
            shared[batch] = steps
        return steps

    @torch.no_grad()
    def media_tokens_by(self, batch: Batch, weights: Mapping[str, Tensor]) -> dict[str, Tokens]:
        """Return the connector's output with other weights, without a graph and without dropout.

        Args:
            batch: rows with their media.
            weights: of all the connector's parameters, by name.
        """
        features = self.media_steps(batch)[0]
        with eval_mode(self.connector), in_variant(batch.variant):
            return torch.func.functional_call(
                self.connector, dict(weights), (features, self._prompt(batch))
            )

    def _prompt(self, batch: Batch) -> Prompt | None:
        """Return the question about each clip; None if the connector does not read it."""
        return (
            prompt_of(batch, self.llm.get_input_embeddings())
            if self.connector.conditioned
            else None
        )

    def connect_for(self, batch: Batch, features: dict[str, Tokens]) -> dict[str, Tokens]:
        """Connect features that replace those of a batch's files, with the batch's questions."""
        return self._steps_for(batch, features)[-1]

    def _steps_for(self, batch: Batch, features: dict[str, Tokens]) -> list[dict[str, Tokens]]:
        with in_variant(batch.variant):
            return self._connect_in_steps(features, self._prompt(batch))

    def embed(self, batch: Batch) -> Tensor:
        """Return the LLM's input embeddings for a batch, ``(R, L, D)``."""
        return self.merge_media(batch.input_ids, self.media_tokens(batch), batch)

    @contextmanager
    def shared_media(self) -> Iterator[None]:
        """Run encoders and connector once for each batch in this block, for several objectives."""
        before = self._shared
        self._shared = {} if before is None else before
        try:
            yield
        finally:
            self._shared = before

    def forward(self, batch: Batch, keep: Tensor | None = None) -> CausalLMOutputWithPast:
        """Compute the logits of a batch.

        Args:
            batch: rows with their media.
            keep: positions ``(K,)`` of the sequence whose logits are computed; None for all.

        Returns:
            ``logits (R, K, V)``, K = L without ``keep``.
        """
        with self.shared_media():
            return self.run_llm(self.embed(batch), batch, keep)

    # ---- checkpoints -------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:  # type: ignore[override]
        """Write config, trained weights and LoRA; frozen backbones are not copied."""
        from avllm.models.checkpoint import save_model

        if kwargs:
            raise TypeError(f"AVLLM.save_pretrained takes a folder only, not {sorted(kwargs)}")
        save_model(self, save_directory)

    @classmethod
    def from_pretrained(cls, folder: str, **kwargs: Any) -> AVLLM:  # type: ignore[override]
        """Read a checkpoint folder; arguments of :func:`avllm.models.checkpoint.load_model`."""
        from avllm.models.checkpoint import load_model

        return load_model(cls, folder, **kwargs)


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Set eval mode for a block; restore each part's mode after it."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training
