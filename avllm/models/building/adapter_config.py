"""Name the parameters of adapter sets, and make PEFT's config of a set from its record.

A record is the entry of a set in config.json: ``{"r", "alpha", "dropout", "targets", "active"}`` of
LoRA with those of its options that were set, and ``{"type", "targets", "active", ...}`` of another
method of PEFT.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from avllm.config_peft import METHODS, PEFT_NAMES, REFUSED_OPTIONS, LoraConfig, PeftConfig
from avllm.errors import UserError, one_line
from avllm.registry import suggest

SET_NAME = re.compile(r"(\.(?:lora|ia3|hada|lokr|vera)_[A-Za-z0-9_]+)\.(\w+)(?=\.|$)")
"""In the name of a parameter: PEFT's name of the tensor, then the set's."""
_VERA_OF_LAYER = re.compile(r"\.layers?\..*\.vera_[AB]\.")
_OURS = {"active", "type"}


def set_of(parameter: str) -> str | None:
    """Return the set that a parameter belongs to by its name, or None."""
    match = SET_NAME.search(parameter)
    return match.group(2) if match else None


def file_key(parameter: str) -> str | None:
    """Return the name of a set's tensor in PEFT's file, which leaves out the set's name.

    It is None for the layers' references to VeRA's two matrices, which all layers share.
    """
    if _VERA_OF_LAYER.search(parameter):
        return None
    return SET_NAME.sub(r"\1", parameter)


def record_of(settings: LoraConfig | PeftConfig) -> dict[str, Any]:
    """Return what config.json says about a set."""
    recorded = settings.model_dump(exclude_defaults=True, exclude={"name", "copy_of"})
    always: dict[str, Any] = {"targets": settings.targets, "active": settings.active}
    if isinstance(settings, LoraConfig):
        always |= {"r": settings.r, "alpha": settings.alpha, "dropout": settings.dropout}
    return always | recorded


def add_record(records: dict[str, dict[str, Any]], settings: LoraConfig | PeftConfig) -> None:
    """Record a set of which the settings are given; a copy takes the place of its source."""
    record = record_of(settings)
    if settings.copy_of is not None:
        source = records[settings.copy_of]
        own = {key: record[key] for key in ("active", "dropout") if key in record}
        record = source | own
        source["active"] = source["active"] and not settings.active
    records[settings.name] = record


def settings_of(name: str, record: Mapping[str, Any]) -> LoraConfig | PeftConfig:
    """Return the settings of a set by its record."""
    if "type" in record:
        return PeftConfig(name=name, **record)
    return LoraConfig(name=name, **record)


def peft_config(record: Mapping[str, Any]) -> Any:
    """Make PEFT's config of a set.

    Raises:
        UserError: an option that PEFT's class does not have, or a value that it refuses.
    """
    import peft

    method = record.get("type", "lora")
    part = peft.LoraConfig if method == "lora" else getattr(peft, METHODS[method])
    names = {ours: theirs for theirs, ours in PEFT_NAMES.items()} if method == "lora" else {}
    names["targets"] = "target_modules"
    options = {}
    for key, value in record.items():
        if key not in _OURS:
            options[names.get(key, key)] = value
    if method == "ia3" and options["target_modules"] == "all-linear":
        # The method's own layers, from PEFT's table: keys, values, feed-forward. PEFT writes a
        # config of all linear layers that it does not read.
        options["target_modules"] = None
    fields = [field.name for field in dataclasses.fields(part)]
    for name in options:
        if name not in fields:
            known = sorted(set(fields) - REFUSED_OPTIONS.keys())
            raise UserError(
                f"peft: {method} has no option {name!r}; {suggest(name, known)}",
                reason="unknown_option",
            )
    try:
        return part(**options, task_type=peft.TaskType.CAUSAL_LM)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"peft: {method} with {options}: {one_line(error)}", reason="peft_option"
        ) from error
