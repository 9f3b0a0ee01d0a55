"""Grow a trained model by streams: further encoders and adapters beside those that are there, which stay bit-equal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from avllm.config import ExtendConfig
from avllm.encoders.base import Encoder
from avllm.errors import UserError
from avllm.fusions.base import consumed_streams
from avllm.models.configuration_avllm import AVConfig
from avllm.models.connector import Connector, bind_adapters
from avllm.models.encoders import load_encoder, widths_of
from avllm.models.processing_avllm import AVProcessor


@dataclass(frozen=True)
class Growth:
    """What an extension adds.

    Attributes:
        encoders: the new ones by stream.
        places: for each adapter that was there its place in the longer connector.
    """

    encoders: dict[str, Encoder]
    places: list[int]


def extend_config(
    config: AVConfig,
    widths: dict[str, int],
    llm_dim: int,
    tokenizer: PreTrainedTokenizerBase,
    extension: ExtendConfig,
) -> Growth:
    """Write an extension into a model's config and its placeholders into the tokenizer; load the new encoders.

    Args:
        widths: of the streams that the model's encoders give.
        llm_dim: width of the LLM's embeddings.

    Raises:
        UserError: a stream of that name is there already, or the new parts do not fit.
    """
    with torch.device("meta"):
        before = Connector(config.connector, widths, llm_dim)
    taken = sorted({*config.encoders, *before.out_streams} & set(extension.encoders))
    if taken:
        raise UserError(
            f"extend.encoders: the model has a stream {taken[0]!r} already, beside {sorted(config.encoders)}; give the "
            "new one another name, with its medium"
        )
    loaded = {stream: load_encoder(stream, spec) for stream, spec in sorted(extension.encoders.items())}
    encoders = {stream: encoder for stream, (encoder, _) in loaded.items()}
    specs, places = _merge(config.connector, extension.connector)
    with torch.device("meta"):
        after = Connector(specs, widths | widths_of(encoders), llm_dim)
    lost = [stream for stream in before.out_streams if stream not in after.out_streams]
    if lost:
        raise UserError(f"extend.connector consumes {lost[0]!r}, which the trained model hands to its LLM; branch it")
    config.encoders = dict(sorted((config.encoders | {s: record for s, (_, record) in loaded.items()}).items()))
    config.connector = specs
    config.layout = extension.layout or config.layout
    made = {s for s, record in config.encoders.items() if s in encoders and record["name"] is None}
    config.trained = sorted({*config.trained, *(f"encoders.{stream}" for stream in made)})
    has_place = {*config.media_token_ids, *consumed_streams(config.fusion)}
    new = [s for s in [*encoders, *after.out_streams] if s not in has_place and "." not in s]
    tokenizer.add_tokens([f"<|{stream}|>" for stream in dict.fromkeys(new)], special_tokens=True)
    ids = {stream: int(tokenizer.convert_tokens_to_ids(f"<|{stream}|>")) for stream in dict.fromkeys(new)}  # type: ignore[arg-type]
    config.media_token_ids = config.media_token_ids | ids
    return Growth(encoders, places)


def _merge(before: list[dict[str, Any]], new: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[int]]:
    """Put new adapters at the ``place`` that each names in the longer list, or at its end.

    Returns:
        the specs of the longer list, and the place in it of each one that was there.

    Raises:
        UserError: a place outside of the list.
    """
    merged: list[tuple[int | None, dict[str, Any]]] = list(enumerate(before))
    for spec in new:
        place = spec.get("place", len(merged))
        if not isinstance(place, int) or not 0 <= place <= len(merged):
            raise UserError(f"extend.connector: place is {place!r}; expected 0 to {len(merged)}, or none for the end")
        merged.insert(place, (None, {key: value for key, value in spec.items() if key != "place"}))
    order = {old: place for place, (old, _) in enumerate(merged) if old is not None}
    return [spec for _, spec in merged], [order[old] for old in range(len(before))]


def extend_model(model: Any, processor: AVProcessor, extension: ExtendConfig) -> AVProcessor:
    """Grow a trained model in place; return the processor that goes with it.

    What was trained keeps its weights to the bit: rows without a new stream get the logits that they had.

    Args:
        model: an AVLLM. processor: its own.

    Raises:
        UserError: see :func:`extend_config`.
    """
    before = list(model.connector.adapters)
    width = before[0].llm_dim
    growth = extend_config(model.config, widths_of(model.encoders), width, processor.tokenizer, extension)
    like = next(model.connector.parameters())
    encoders = {**model.encoders, **{s: e.to(model.device) for s, e in growth.encoders.items()}}
    model.encoders = nn.ModuleDict(dict(sorted(encoders.items())))
    model.connector = Connector(model.config.connector, widths_of(model.encoders), width)
    model.connector.to(device=like.device, dtype=like.dtype)
    for place, adapter in enumerate(model.connector.adapters):
        if place not in growth.places:
            adapter.load_init()
    for adapter, place in zip(before, growth.places, strict=True):
        model.connector[place] = adapter
    bind_adapters(model)
    model.freeze()
    grown = AVProcessor.from_model(model, processor.tokenizer)
    grown.max_length, grown.timeout = processor.max_length, processor.timeout
    return grown


def extend_processor(processor: AVProcessor, extension: ExtendConfig) -> AVProcessor:
    """Return the processor of an extended model whose weights are not there, for looking at rows.

    Raises:
        UserError: see :func:`extend_config`.
    """
    config, tokenizer = processor.config, processor.tokenizer
    growth = extend_config(config, processor.widths, processor.llm_dim, tokenizer, extension)
    preprocessors = processor.preprocessors | {s: e.preprocessor() for s, e in growth.encoders.items()}
    widths = processor.widths | widths_of(growth.encoders)
    by_encoder = sorted(widths, key=lambda name: name.partition(".")[0])  # as AVLLM has them
    return AVProcessor(
        tokenizer,
        {stream: preprocessors[stream] for stream in sorted(preprocessors)},
        config,
        {name: widths[name] for name in by_encoder},
        processor.llm_dim,
        processor.max_length,
        processor.timeout,
    )
