"""Encoders of a model by their section of a preset, and by their record in a checkpoint's config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import ModuleDict
from transformers import AutoConfig

from avllm.encoders._backbone import Backbone
from avllm.encoders.base import Encoder
from avllm.errors import UserError, loading
from avllm.models.connector import stream_names
from avllm.registry import check_options, load, make
from avllm.streams import medium_of


def build_encoder(record: dict[str, Any]) -> Encoder:
    """An encoder with random weights out of its record in the config."""
    return load("encoders", record["type"])(record["config"], **record["options"])


def pretrained_encoder(stream: str, spec: dict[str, Any], options: dict[str, Any]) -> Encoder:
    """An encoder by ``{"type", "name", "revision", "dtype"}`` with its own options.

    Raises:
        UserError: it cannot be loaded.
    """
    part = load("encoders", spec["type"])
    with loading(f"the {stream} encoder ({spec['type']})", spec["name"]):
        return part.from_pretrained(spec["name"], revision=spec.get("revision"), dtype=spec.get("dtype"), **options)


def check_encoder(stream: str, spec: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The class of an encoder and its own options, out of what :func:`load_encoder` takes; nothing is loaded.

    Raises:
        UnknownPartError: an unknown type or option. UserError: neither name nor config is given, or the encoder is of
            another medium.
    """
    given = {k: v for k, v in spec.items() if k not in ("medium", "type", "name", "config", "revision", "dtype")}
    part = load("encoders", spec.get("type", ""))
    medium = medium_of(stream, spec)
    if part.medium != medium:
        raise UserError(f"encoder {spec['type']!r} is for {part.medium}; stream {stream!r} is {medium}")
    if hasattr(ModuleDict, stream):
        raise UserError(f"a stream is called {stream!r}, which torch keeps for itself; choose another name")
    check_options(part, given, f"encoder {spec['type']!r}")
    if ("name" in spec) == ("config" in spec):
        raise UserError(
            f"encoder {spec['type']!r} of {stream}: give a name (hub or folder) or a config (random weights)"
        )
    return part, given


def load_encoder(stream: str, spec: dict[str, Any]) -> tuple[Encoder, dict[str, Any]]:
    """An encoder by its section of a preset, and its record for the config.

    Args:
        stream: its name. spec: ``{"medium", "type", "name" or "config", "revision", "dtype", **options}``.

    Raises:
        UserError: see :func:`check_encoder` and :func:`pretrained_encoder`.
    """
    part, given = check_encoder(stream, spec)
    random = "config" in spec
    encoder: Any = make(part, spec["config"], **given) if random else pretrained_encoder(stream, spec, given)
    record = {
        "medium": medium_of(stream, spec),
        "type": spec["type"],
        "name": spec.get("name"),
        "revision": spec.get("revision"),
        "dtype": spec.get("dtype"),
        "config": encoder.backbone_config.to_dict(),
        "options": encoder.options(),
    }
    return encoder, record


def output_widths(stream: str, spec: dict[str, Any]) -> dict[str, int]:
    """Return the width of each stream that an encoder will give, without its weights where it is a Backbone.

    Raises:
        UserError: see :func:`check_encoder`.
    """
    part, given = check_encoder(stream, spec)
    if issubclass(part, Backbone):
        with torch.device("meta"):
            if "config" in spec:
                encoder = make(part, spec["config"], **given)
            else:
                with loading(f"the {stream} encoder ({spec['type']})", spec["name"]):
                    config = AutoConfig.from_pretrained(spec["name"], revision=spec.get("revision"))
                    encoder = part(config, **given)
    else:
        encoder = load_encoder(stream, spec)[0]
    return widths_of({stream: encoder})


def widths_of(encoders: Mapping[str, Any]) -> dict[str, int]:
    """Return the width of each stream that encoders give: ``{"audio": 512, "audio.4": 512}``."""
    widths: dict[str, int] = {}
    for stream, encoder in encoders.items():
        names = stream_names(stream, encoder.layer_names)
        widths |= {name: encoder.out_dims[layer] for name, layer in zip(names, encoder.layer_names, strict=True)}
    return widths
