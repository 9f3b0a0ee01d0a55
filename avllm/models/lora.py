"""Named sets of adapters on the LLM, in PEFT's layers: LoRA (Hu et al. 2021, arXiv 2106.09685), ...

A set is what PEFT calls an adapter; its parameters are named ``...lora_A.<set>.weight``. Which sets
are active is an attribute of each layer. It is set here directly: PEFT's ``set_adapter`` and
``disable_adapter`` change ``requires_grad`` as well, so that a frozen set would begin to train in
the middle of a run.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from avllm.config_peft import LoraConfig, PeftConfig
from avllm.errors import UserError, one_line
from avllm.models.building.adapter_config import (
    file_key,
    peft_config,
    record_of,
    set_of,
    settings_of,
)
from avllm.models.checkpoint_format import CheckpointError, write_tensors
from avllm.weights import WeightError, check_finite, no_larger_than, size_of

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"  # PEFT's names
_NO_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_version",
    "revision",
}
"""Entries of PEFT's file that say where an adapter comes from, and change no answer."""
_DROPOUTS = ("lora_dropout", "vera_dropout")


def set_names(llm: nn.Module) -> list[str]:
    """Return the names of the LLM's sets, oldest first."""
    return list(getattr(llm, "peft_config", {}))


# ---- which sets are active -----------------------------------------------------------------------


def active_sets(llm: nn.Module) -> tuple[str, ...]:
    """Return the names of the sets that take part in a forward pass."""
    first = next(_layers(llm), None)
    return () if first is None else tuple(first.active_adapters)


def activate(llm: nn.Module, names: Sequence[str]) -> None:
    """Let exactly these sets take part in forward passes; ``requires_grad`` does not change.

    They are added up in the order of their names, so that the sum is the same after a save.

    Raises:
        UserError: a set that the LLM does not have, or sets that are merged into its weights.
    """
    unknown = [name for name in names if name not in set_names(llm)]
    if unknown:
        raise UserError(
            f"the LLM has no LoRA set {unknown[0]!r}; it has {set_names(llm) or 'none'}"
        )
    names = sorted(set(names))
    if active_sets(llm) == tuple(names):
        return
    for layer in _layers(llm):
        if layer.merged:
            raise UserError(
                "LoRA sets are merged into the LLM's weights; call llm.unmerge_adapter() first"
            )
        layer._active_adapter = names


def _layers(llm: nn.Module) -> Iterator[Any]:
    if not hasattr(llm, "peft_config"):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in llm.modules():
        if isinstance(module, BaseTunerLayer):
            yield module


class ActiveSets(AbstractContextManager[None]):
    """Activate exactly these sets for a block, then the earlier ones again. Blocks nest.

    Args:
        llm: the LLM.
        names: the sets, whose outputs add up; empty for the bare LLM.
    """

    def __init__(self, llm: nn.Module, names: Sequence[str]) -> None:
        self.llm = llm
        self.names = tuple(names)
        self._before: list[tuple[str, ...]] = []

    def __enter__(self) -> None:
        before = active_sets(self.llm)
        activate(self.llm, self.names)
        self._before.append(before)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        activate(self.llm, self._before.pop())


def eval_frozen_sets(llm: nn.Module) -> None:
    """Switch off the dropout of sets in which nothing trains."""
    trained = {set_of(name) for name, p in llm.named_parameters() if p.requires_grad}
    for layer in _layers(llm):
        for kind in _DROPOUTS:
            for name, dropout in getattr(layer, kind, {}).items():
                if name not in trained:
                    dropout.eval()


# ---- adding, merging -----------------------------------------------------------------------------


def add_set(llm: Any, settings: LoraConfig | PeftConfig) -> Any:
    """Put a set on the LLM and return the LLM, wrapped by PEFT if it was not; the new set trains.

    The sets that were active stay so, the new one is not active yet (the first one is).

    Raises:
        UserError: the LLM has a set of this name or of another method, no layers of the names in
            ``targets``, or no set to copy; or PEFT does not take an option.
    """
    if settings.copy_of is not None:
        if settings.copy_of not in set_names(llm):
            raise UserError(
                f"lora.copy_of is {settings.copy_of!r}, but the LLM has "
                f"{set_names(llm) or 'no sets'}; expected the name of a set of the checkpoint that "
                "this stage starts from",
                reason="no_source",
            )
        config = copy.deepcopy(llm.peft_config[settings.copy_of])
        if isinstance(settings, LoraConfig):
            config.lora_dropout = settings.dropout
    else:
        config = peft_config(record_of(settings))
    try:
        llm = _wrap(llm, settings.name, config)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, NotImplementedError) as error:
        raise UserError(
            f"lora set {settings.name!r}: lora.targets is {settings.targets!r}: {one_line(error)}"
        ) from error
    if settings.copy_of is not None:
        _copy_set(llm, settings.copy_of, settings.name)
    return llm


def _wrap(llm: Any, name: str, config: Any) -> Any:
    """Add PEFT's adapter; no other parameter of a wrapped LLM changes ``requires_grad``."""
    import peft

    if name in set_names(llm):
        raise UserError(
            f"the LLM has a LoRA set named {name!r} already; leave out lora: to go on training it, "
            "or give the new set another name",
            reason="name_taken",
        )
    if not hasattr(llm, "peft_config"):
        return peft.get_peft_model(llm, config, adapter_name=name)
    others = {str(other.peft_type.value) for other in llm.peft_config.values()}
    if others != {str(config.peft_type.value)}:
        raise UserError(
            f"the LLM has sets of {' and '.join(others)}, and set {name!r} is of "
            f"{config.peft_type.value}; PEFT puts one method on an LLM. Merge the earlier ones "
            "first (AVLLM.merge_lora), or add a set of the same method",
            reason="other_method",
        )
    trains = {key: p.requires_grad for key, p in llm.named_parameters()}
    active = active_sets(llm)
    llm.add_adapter(name, config)
    for key, p in llm.named_parameters():
        p.requires_grad_(trains.get(key, set_of(key) == name))
    activate(llm, active)
    return llm


@torch.no_grad()
def _copy_set(llm: Any, source: str, target: str) -> None:
    values = set_state(llm, source)
    for name, tensor in set_state(llm, target).items():
        tensor.copy_(values[name])


def merge_sets(llm: Any, names: Sequence[str]) -> Any:
    """Return the bare LLM with these sets added to its weights; the other sets are dropped."""
    names = list(dict.fromkeys(names))
    activate(llm, names)
    return llm.merge_and_unload(adapter_names=names)


# ---- on the disk ---------------------------------------------------------------------------------


def set_state(llm: nn.Module, name: str) -> dict[str, Tensor]:
    """Return a set's tensors under the names of PEFT's files, which leave out the set's."""
    state = {}
    for key, tensor in llm.state_dict().items():
        name_in_file = file_key(key)
        if set_of(key) == name and name_in_file is not None:
            state[name_in_file] = tensor
    return state


def save_sets(llm: Any, folder: Path) -> None:
    """Write each set into ``folder/<name>`` in PEFT's form."""
    for name in set_names(llm):
        (folder / name).mkdir(parents=True, exist_ok=True)
        state = {key: x.detach().cpu().contiguous() for key, x in set_state(llm, name).items()}
        write_tensors(state, folder / name / WEIGHTS_FILE)
        config = copy.deepcopy(llm.peft_config[name])
        config.inference_mode = True
        config.save_pretrained(str(folder / name))


def _set_folders(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_FILE}"))


def load_sets(llm: Any, folder: Path, records: Mapping[str, Mapping[str, Any]]) -> Any:
    """Put the sets of a checkpoint on the LLM and return it.

    Args:
        llm: an LLM without sets.
        folder: contains one folder for each set.
        records: ``lora`` of config.json, by set.

    Raises:
        CheckpointError: a set is missing or not named, differs from its record, or its tensors do
            not fit the LLM's layers.
    """
    if sorted(records) != _set_folders(folder):
        raise CheckpointError(
            f"{folder} holds the LoRA sets {_set_folders(folder)}, but config.json names "
            f"{sorted(records)}; copy the checkpoint again",
            reason="lora_sets",
        )
    for name, record in records.items():
        llm = _load_set(llm, folder / name, name, record)
    return llm


def _load_set(llm: Any, folder: Path, name: str, record: Mapping[str, Any]) -> Any:
    """Put one set on the LLM, made by its record; PEFT's own loading passes over odd keys."""
    try:
        saved = load_file(folder / WEIGHTS_FILE)
        content = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        message = f"{folder} is damaged ({one_line(error)}); copy the checkpoint again"
        raise CheckpointError(message, reason="damaged") from error
    if "type" not in record:
        _check_rank(folder, saved, {record["r"], *record.get("rank_pattern", {}).values()})
    check_finite(saved.items(), folder / WEIGHTS_FILE)
    size = size_of([folder / WEIGHTS_FILE])
    try:
        with no_larger_than(size, f"{folder}: config.json"):
            # By way of the settings, which refuse options that change the LLM's own weights.
            llm = _wrap(llm, name, peft_config(record_of(settings_of(name, record))))
    except WeightError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        message = f"{folder / CONFIG_FILE} does not fit the LLM: {one_line(error)}"
        raise CheckpointError(message, reason="lora_config") from error
    _check_peft_file(folder, content, llm.peft_config[name])
    expected = set_state(llm, name)
    missing = sorted(expected.keys() - saved.keys())
    unexpected = sorted(saved.keys() - expected.keys())
    common = expected.keys() & saved.keys()
    shapes = sorted(key for key in common if saved[key].shape != expected[key].shape)
    if missing or unexpected or shapes:
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE} does not fit the LLM: missing {missing[:3]}, unexpected "
            f"{unexpected[:3]}, other shape {shapes[:3]}; expected what {CONFIG_FILE} says for "
            "every layer. Copy the checkpoint again",
            reason="lora_weights",
        )
    with torch.no_grad():
        for key, tensor in expected.items():
            tensor.copy_(saved[key])
    return llm


def _check_rank(folder: Path, saved: Mapping[str, Tensor], recorded: set[int]) -> None:
    """Refuse a file without adapters of the recorded ranks, before layers of them are made."""
    ranks = {tensor.shape[0] for key, tensor in saved.items() if key.endswith("lora_A.weight")}
    if not ranks or not ranks <= recorded:
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE} has adapters of rank {sorted(ranks) or 'none'}; config.json "
            f"says {sorted(recorded)}. Copy the checkpoint again",
            reason="lora_weights",
        )


def _check_peft_file(folder: Path, content: Any, config: Any) -> None:
    """Refuse PEFT's file of a set if it differs from what config.json records.

    Loading does not follow PEFT's file, but other programs do: both have to mean the same.
    """
    if not isinstance(content, dict):
        content = {}
    expected = config.to_dict()
    odd = []
    for key in sorted({*content, *expected} - _NO_EFFECT):
        default = expected.get(key)
        if key in content and _plain(content[key]) != _plain(default):
            odd.append(f"{key} {content[key]!r} instead of {default!r}")
    missing = [key for key in ("peft_type", "lora_alpha") if key in expected and key not in content]
    if odd or missing:
        raise CheckpointError(
            f"{folder / CONFIG_FILE} differs from config.json: "
            f"{', '.join(odd[:3]) or f'it has no {missing[0]}'}; copy the checkpoint again",
            reason="lora_config",
        )


def _plain(value: Any) -> Any:
    """Return a value of PEFT's config in a form that compares equal after a save."""
    if isinstance(value, list | set | tuple):
        return sorted(map(str, value))
    return value or None  # absent, false and empty mean the same
