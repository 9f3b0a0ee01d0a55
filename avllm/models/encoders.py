"""Encoders of a model by their section of a preset, and by their record in a checkpoint's config."""

from __future__ import annotations

from typing import Any

from avllm.encoders.base import Encoder
from avllm.errors import UserError, loading
from avllm.registry import check_options, load, make


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
            another stream.
    """
    given = {k: v for k, v in spec.items() if k not in ("type", "name", "config", "revision", "dtype")}
    part = load("encoders", spec.get("type", ""))
    if part.stream != stream:
        raise UserError(f"encoder {spec['type']!r} is for {part.stream}; it is given for {stream}")
    check_options(part, given, f"encoder {spec['type']!r}")
    if ("name" in spec) == ("config" in spec):
        raise UserError(
            f"encoder {spec['type']!r} of {stream}: give a name (hub or folder) or a config (random weights)"
        )
    return part, given


def load_encoder(stream: str, spec: dict[str, Any]) -> tuple[Encoder, dict[str, Any]]:
    """An encoder by ``{"type", "name" or "config", "revision", "dtype", **options}`` and its record for the config.

    Raises:
        UserError: see :func:`check_encoder` and :func:`pretrained_encoder`.
    """
    part, given = check_encoder(stream, spec)
    random = "config" in spec
    encoder: Any = make(part, spec["config"], **given) if random else pretrained_encoder(stream, spec, given)
    record = {
        "type": spec["type"],
        "name": spec.get("name"),
        "revision": spec.get("revision"),
        "dtype": spec.get("dtype"),
        "config": encoder.backbone_config.to_dict(),
        "options": encoder.options(),
    }
    return encoder, record
