"""Make encoders from their section of a preset, or from their record in a checkpoint's config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import ModuleDict

from avllm.encoders._backbone import Backbone
from avllm.encoders.base import Encoder
from avllm.errors import UserError, about_setting, loading
from avllm.models.connector import stream_names
from avllm.registry import check_options, load, make
from avllm.streams import medium_of
from avllm.weights import Size, no_larger_than, whole_name

_COMMON_KEYS = ("medium", "type", "name", "config", "revision", "dtype")
"""Keys of an encoder's section that are no options of its class."""


def build_encoder(record: dict[str, Any]) -> Encoder:
    """Build an encoder with random weights from its record in the config."""
    return load("encoders", record["type"])(record["config"], **record["options"])


def try_encoder(stream: str, record: dict[str, Any], size: Size) -> None:
    """Build an encoder without weights, to stop where it is larger than the files that fill it.

    Encoders of users may not know how to be built like this; they are left out.

    Raises:
        WeightError: it is larger.
    """
    if issubclass(load("encoders", record["type"]), Backbone):
        with torch.device("meta"), no_larger_than(size, f"the {stream} encoder"):
            build_encoder(record)


def build_encoders(records: Mapping[str, dict[str, Any]]) -> dict[str, Encoder]:
    """Build encoders with random weights from their records, by stream."""
    return {stream: build_encoder(record) for stream, record in records.items()}


def pretrained_encoder(stream: str, spec: dict[str, Any], options: dict[str, Any]) -> Encoder:
    """Load an encoder by ``{"type", "name", "revision", "dtype"}``, with options of its class.

    Raises:
        UserError: it cannot be loaded.
    """
    part = load("encoders", spec["type"])
    with loading(f"the {stream} encoder ({spec['type']})", spec["name"]):
        return part.from_pretrained(
            spec["name"], revision=spec.get("revision"), dtype=spec.get("dtype"), **options
        )


def check_encoder(stream: str, spec: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Check an encoder's section; return its class and the options of the class. Loads nothing.

    Raises:
        UnknownPartError: an unknown type or option.
        UserError: name and config are both missing or both given, or the encoder is for another
            medium.
    """
    options = {name: value for name, value in spec.items() if name not in _COMMON_KEYS}
    part = load("encoders", spec.get("type", ""))
    medium = medium_of(stream, spec)
    if part.medium != medium:
        raise UserError(
            f"encoder {spec['type']!r} is for {part.medium}; stream {stream!r} is {medium}"
        )
    if hasattr(ModuleDict, stream):
        raise UserError(
            f"a stream is called {stream!r}, which torch keeps for itself; choose another name"
        )
    check_options(part, options, f"encoder {spec['type']!r}")
    if issubclass(part, Backbone):
        part.check_preprocessing(options.get("preprocessing") or {})
    if ("name" in spec) == ("config" in spec):
        raise UserError(
            f"encoder {spec['type']!r} of {stream}: give a name (hub or folder) or a config "
            "(random weights)"
        )
    return part, options


def load_encoder(stream: str, spec: dict[str, Any]) -> tuple[Encoder, dict[str, Any]]:
    """Load an encoder by its section of a preset; return it with its record for the config.

    Args:
        stream: the stream's name.
        spec: ``{"medium", "type", "name" or "config", "revision", "dtype", **options}``.

    Raises:
        UserError: see :func:`check_encoder` and :func:`pretrained_encoder`.
    """
    part, options = check_encoder(stream, spec)
    encoder: Any
    with about_setting(f"model.encoders.{stream}"):
        if "config" in spec:
            encoder = make(part, spec["config"], **options)
        else:
            encoder = pretrained_encoder(stream, spec, options)
    record = {
        "medium": medium_of(stream, spec),
        "type": spec["type"],
        "name": whole_name(spec.get("name")),
        "revision": spec.get("revision"),
        "dtype": spec.get("dtype"),
        "config": encoder.backbone_config.to_dict(),
        "options": encoder.options(),
    }
    return encoder, record


def output_widths(stream: str, spec: dict[str, Any]) -> dict[str, int]:
    """Return the width of each stream that an encoder gives; a Backbone's weights are not read.

    Raises:
        UserError: see :func:`check_encoder`.
    """
    part, options = check_encoder(stream, spec)
    if not issubclass(part, Backbone):
        encoder, _ = load_encoder(stream, spec)
        return widths_of({stream: encoder})
    with torch.device("meta"), about_setting(f"model.encoders.{stream}"):
        if "config" in spec:
            encoder = make(part, spec["config"], **options)
        else:
            with loading(f"the {stream} encoder ({spec['type']})", spec["name"]):
                config = part.saved_config(spec["name"], spec.get("revision"))
                encoder = part(config, **options)
    return widths_of({stream: encoder})


def widths_of(encoders: Mapping[str, Any]) -> dict[str, int]:
    """Return the width of each stream that encoders give: ``{"audio": 512, "audio.4": 512}``."""
    widths: dict[str, int] = {}
    for stream, encoder in encoders.items():
        layers = encoder.layer_names
        for name, layer in zip(stream_names(stream, layers), layers, strict=True):
            widths[name] = encoder.out_dims[layer]
    return widths
