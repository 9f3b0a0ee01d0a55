"""Grow a trained model by encoders and adapters; those that it has stay equal to the bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from avllm.config_model import ExtendConfig
from avllm.encoders.base import Encoder
from avllm.errors import UserError
from avllm.fusions.base import consumed_streams
from avllm.models.configuration_avllm import AVConfig
from avllm.models.connector import Connector, bind_adapters, check_placeholders
from avllm.models.encoders import load_encoder, widths_of
from avllm.models.processing_avllm import AVProcessor


@dataclass(frozen=True)
class Growth:
    """The additions of an extension.

    Attributes:
        encoders: the new encoders by stream.
        places: for each earlier adapter, its place in the longer connector.
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
    """Write an extension into a model's config and tokenizer; load the new encoders.

    Args:
        config: the model's, changed in place.
        widths: of the streams of the model's encoders.
        llm_dim: width of the LLM's embeddings.
        tokenizer: the model's; it gets placeholders for new streams.
        extension: the encoders and adapters to add.

    Raises:
        UserError: the model has a stream of that name, or the new parts do not fit.
    """
    with torch.device("meta"):
        before = Connector(config.connector, widths, llm_dim)
    taken = sorted({*config.encoders, *before.out_streams} & set(extension.encoders))
    if taken:
        raise UserError(
            f"extend.encoders: the model has a stream {taken[0]!r} already, beside "
            f"{sorted(config.encoders)}; give the new one another name, with its medium"
        )
    encoders: dict[str, Encoder] = {}
    records: dict[str, dict[str, Any]] = {}
    for stream, spec in sorted(extension.encoders.items()):
        encoders[stream], records[stream] = load_encoder(stream, spec)
    specs, places = _merge(config.connector, extension.connector)
    with torch.device("meta"):
        after = Connector(specs, widths | widths_of(encoders), llm_dim)
    lost = [stream for stream in before.out_streams if stream not in after.out_streams]
    if lost:
        raise UserError(
            f"extend.connector consumes {lost[0]!r}, which the trained model hands to its LLM; "
            "branch it"
        )
    config.encoders = dict(sorted((config.encoders | records).items()))
    config.connector = specs
    config.layout = extension.layout or config.layout
    made = [f"encoders.{s}" for s, record in records.items() if record["name"] is None]
    config.trained = sorted({*config.trained, *made})
    _add_placeholders(config, [*encoders, *after.out_streams], tokenizer)
    check_placeholders(after.out_streams, config.media_token_ids, consumed_streams(config.fusion))
    return Growth(encoders, places)


def _add_placeholders(
    config: AVConfig, streams: list[str], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Give a placeholder to each stream that has none and that no fusion consumes."""
    reached = {*config.media_token_ids, *consumed_streams(config.fusion)}
    new = [s for s in dict.fromkeys(streams) if s not in reached and "." not in s]
    tokenizer.add_tokens([f"<|{stream}|>" for stream in new], special_tokens=True)
    ids = dict(config.media_token_ids)
    for stream in new:
        ids[stream] = cast(int, tokenizer.convert_tokens_to_ids(f"<|{stream}|>"))
    config.media_token_ids = ids


def _merge(
    before: list[dict[str, Any]], new: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[int]]:
    """Insert each new adapter at its ``place`` in the longer list, by default at the end.

    Returns:
        the specs of the longer list, and the place in it of each earlier adapter.

    Raises:
        UserError: a place outside of the list.
    """
    merged: list[tuple[int | None, dict[str, Any]]] = list(enumerate(before))
    for spec in new:
        place = spec.get("place", len(merged))
        if not isinstance(place, int) or not 0 <= place <= len(merged):
            raise UserError(
                f"extend.connector: place is {place!r}; expected 0 to {len(merged)}, or none for "
                "the end"
            )
        merged.insert(place, (None, {key: value for key, value in spec.items() if key != "place"}))
    # An earlier adapter never moves before another one: their places come in their order.
    places = [place for place, (earlier, _) in enumerate(merged) if earlier is not None]
    return [spec for _, spec in merged], places


def extend_model(model: Any, processor: AVProcessor, extension: ExtendConfig) -> AVProcessor:
    """Grow a trained model in place; return its new processor.

    Trained weights do not change: rows without a new stream get the same logits as before.

    Args:
        model: an AVLLM.
        processor: the model's.
        extension: the encoders and adapters to add.

    Raises:
        UserError: see :func:`extend_config`.
    """
    before = list(model.connector.adapters)
    width = before[0].llm_dim
    growth = extend_config(
        model.config, widths_of(model.encoders), width, processor.tokenizer, extension
    )
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
    grown.max_length = processor.max_length
    grown.timeout = processor.timeout
    return grown


def extend_processor(processor: AVProcessor, extension: ExtendConfig) -> AVProcessor:
    """Return the processor of an extended model, without the model's weights, for making rows.

    Raises:
        UserError: see :func:`extend_config`.
    """
    config, tokenizer = processor.config, processor.tokenizer
    growth = extend_config(config, processor.widths, processor.llm_dim, tokenizer, extension)
    preprocessors = processor.preprocessors | {
        s: e.preprocessor() for s, e in growth.encoders.items()
    }
    widths = processor.widths | widths_of(growth.encoders)
    by_encoder = sorted(widths, key=lambda name: name.partition(".")[0])  # the order of AVLLM
    return AVProcessor(
        tokenizer,
        {stream: preprocessors[stream] for stream in sorted(preprocessors)},
        config,
        {name: widths[name] for name in by_encoder},
        processor.llm_dim,
        processor.max_length,
        processor.timeout,
    )
