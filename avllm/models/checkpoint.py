"""Write and read a checkpoint folder: trained weights, LoRA, processor, manifest."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from avllm.config_model import LLMConfig
from avllm.models.building.adapter_config import set_of
from avllm.models.checkpoint_format import (
    LORA,
    TRAINED,
    CheckpointError,
    backbone_places,
    backbone_records,
    backbones,
    find_backbone,
    fingerprint,
    part_of,
    read_manifest_of,
    write_tensors,
)
from avllm.models.configuration_avllm import AVConfig
from avllm.models.connector import Connector
from avllm.models.encoders import build_encoder, pretrained_encoder, try_encoder, widths_of
from avllm.models.llm import attention, is_quantised, load_llm
from avllm.models.loading.digests import (
    ALL_FILES,
    MODEL_FILES,
    WRITTEN_BY_MODEL,
    check_files,
    write_manifest,
)
from avllm.models.loading.files import read_config, reading
from avllm.models.loading.foreign_parts import check_parts
from avllm.models.lora import activate, load_sets, save_sets, set_names
from avllm.models.whole_folder import replacing
from avllm.weights import Size, check_finite, no_larger_than, size_of


def mark_trained(model: Any) -> None:
    """Record the parts in which weights train now: from here on a checkpoint holds them whole.

    Raises:
        CheckpointError: one of them is quantised, which no checkpoint holds.
    """
    parts = set(model.config.trained)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and set_of(name) is None:
            parts.add(part_of(name))
    if "llm" in parts and is_quantised(model.llm):
        raise CheckpointError(
            "the LLM's weights train, but it is quantised, which cannot be saved whole; "
            "train LoRA adapters alone in it, or leave llm.quantize out"
        )
    model.config.trained = sorted(parts)


def trained_state(model: Any) -> dict[str, Tensor]:
    """Return the tensors of the trained parts, without LoRA's, which are saved in PEFT's form.

    PEFT wraps the LLM and the layers that it adapts; the names are those of the bare LLM.
    """
    parts = set(model.config.trained)
    state = {}
    for name, tensor in model.state_dict().items():
        if part_of(name) in parts and set_of(name) is None:
            bare = name.replace("llm.base_model.model.", "llm.").replace(".base_layer.", ".")
            state[bare] = tensor
    return state


def save_model(model: Any, folder: str | Path) -> None:
    """Write config.json, trained.safetensors, lora/ and the manifest, all of them or none.

    A manifest that is there keeps its stages.

    Raises:
        CheckpointError: LoRA sets were added or merged in a way that the folder could not record.
        WriteError: a file cannot be written; the folder is unchanged.
    """
    _check_lora(model)
    model.config.architectures = [type(model).__name__]
    state = {}
    for name, tensor in trained_state(model).items():
        # Tied weights share their storage, which safetensors refuses; a clone does not.
        state[name] = tensor.detach().cpu().clone().contiguous()
    with replacing(folder, WRITTEN_BY_MODEL) as partial:
        model.config.save_pretrained(partial)
        write_tensors(state, partial / TRAINED)
        if model.config.lora:
            save_sets(model.llm, partial / LORA)
        write_manifest(partial, MODEL_FILES, backbones=backbones(model.config, folder))


def _check_lora(model: Any) -> None:
    _refuse_other_adapters(model)
    sets = set_names(model.llm)
    if sorted(model.config.lora) != sorted(sets):
        raise CheckpointError(
            f"config.lora names the sets {sorted(model.config.lora)} and the LLM has "
            f"{sorted(sets)}; "
            "put them on with add_lora() and make them part of the LLM with merge_lora()"
        )
    merged = (
        any(getattr(module, "merged", False) for module in model.llm.modules()) if sets else False
    )
    if merged and "llm" in model.config.trained:
        raise CheckpointError(
            "the LLM's own weights hold its adapters now (merge_adapter), and both would be saved; "
            "call llm.unmerge_adapter() first, or merge_lora() for good"
        )


def _refuse_other_adapters(model: Any) -> None:
    """Refuse adapters that PEFT was asked by hand to put on the whole model.

    Raises:
        CheckpointError: names one of their layers.
    """
    own = set(model.config.lora)
    for name, _ in model.named_parameters():
        adapter = set_of(name)
        if adapter is not None and not (name.startswith("llm.") and adapter in own):
            raise CheckpointError(
                f"{name} belongs to an adapter that was not put on with add_lora(). config.json "
                "could not record it: it would be lost. Use AVLLM.add_lora, or save it with PEFT "
                "and unload it first",
                reason="foreign_adapter",
            )


def save_checkpoint(
    model: Any, processor: Any, folder: str | Path, stages: list[dict[str, Any]]
) -> None:
    """Write a whole checkpoint folder; a kill leaves the one before, or none, or this one.

    Args:
        model: the model.
        processor: its processor.
        folder: the checkpoint; made if it does not exist.
        stages: the chain of stages, oldest first: ``{"stage", "settings", "steps", "data", ...}``.
    """
    with replacing(folder, ALL_FILES) as partial:
        save_model(model, partial)
        processor.save_pretrained(partial)
        write_manifest(partial, ALL_FILES, backbones(model.config, folder), stages)


def load_model(
    cls: Any,
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str | None = None,
    quantize: str | None = None,
    backbones: dict[str, str] | None = None,
    allow_parts: Collection[str] = (),
) -> Any:
    """Read a checkpoint folder: its backbones by name, then the trained weights, then LoRA.

    Args:
        cls: the model class.
        folder: a checkpoint.
        device: where the model is put.
        dtype: of the LLM; None for the one that it was trained with.
        quantize: ``4bit`` or ``8bit`` for the LLM; None for what it was trained with.
        backbones: other folders of backbones, ``{"llm": FOLDER, "audio": FOLDER}``, an encoder by
            its stream.
        allow_parts: parts from outside of the package, ``pkg.module:Class``, that the checkpoint
            may name; loading it imports their modules.

    Raises:
        ForeignPartError: the checkpoint names another part from outside of the package.
        CheckpointError: missing or unexpected weights, or a backbone that is not found, or has
            another hash than the recorded one.
    """
    folder = Path(folder)
    check_files(folder, ALL_FILES)
    config = read_config(folder)
    check_parts(config, folder, allow_parts)
    _move_backbones(config, folder, backbones or {})
    with reading(folder, "the model"):
        model = _build(cls, config, folder, dtype, quantize)
        return model.freeze().eval().to(device)


def _build(
    cls: Any, config: AVConfig, folder: Path, dtype: str | None, quantize: str | None
) -> Any:
    """Build a model with the weights of its backbones and of the checkpoint."""
    settings = {name: value for name, value in config.llm.items() if name != "config"}
    if dtype is not None:
        settings["dtype"] = dtype
    if quantize is not None:
        settings["quantize"] = quantize
    size = _trained_size(folder)
    llm = _load_llm(config, LLMConfig(**settings), size)
    encoders = _load_encoders(config, size)
    lora = config.lora
    config.lora = {}  # LoRA sets are loaded from their folders, after the model is built
    with no_larger_than(size, f"{folder}: config.json"):
        width = llm.get_input_embeddings().weight.shape[-1]
        with torch.device("meta"):  # nothing is allocated yet
            Connector(config.connector, widths_of(encoders), width)
    with no_larger_than(size, f"{folder}: config.json"):
        model = cls(config, llm=llm, encoders=encoders)
    _load_trained(model, folder)
    model.config.lora = lora
    if lora:
        model.llm = load_sets(model.llm, folder / LORA, lora)
        activate(model.llm, model.config.active_lora)
        model.attach_words()
    return model


def _trained_size(folder: Path) -> Size:
    """Return what trained.safetensors can fill.

    Raises:
        CheckpointError: the folder has none.
    """
    path = folder / TRAINED
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {TRAINED}; expected the folder of a finished avllm run",
            reason="missing",
        )
    return size_of([path])


def _move_backbones(config: AVConfig, folder: Path, places: dict[str, str]) -> None:
    """Write into the config where each backbone lies, and compare it with the recorded hash."""
    recorded = read_manifest_of(folder)["backbones"]
    records = backbone_records(config)
    given = {}
    for part, place in places.items():
        name = part if part in records else f"encoders.{part}"
        if name not in records:
            raise CheckpointError(
                f"{folder} has no backbone {part}; it has {', '.join(records)}", reason="backbone"
            )
        if not Path(place).exists():
            raise CheckpointError(
                f"the {name} backbone is to be in {place}, which is not there", reason="backbone"
            )
        given[name] = os.path.abspath(place)
    for part, record in records.items():
        entry = recorded.get(part, {}) | {"name": record.get("name")}
        record["name"] = given.get(part) or find_backbone(entry, folder)
        if part not in config.trained:
            _check_backbone(part, record["name"], entry, folder, is_given=part in given)


def _check_backbone(
    part: str, name: str | None, entry: dict[str, Any], folder: Path, *, is_given: bool
) -> None:
    """Compare a backbone with what the manifest has about it.

    Raises:
        CheckpointError: it is not there, is another one, or the manifest has no hash of it.
    """
    advice = f"say where it is: --backbone {part}=FOLDER (in Python backbones={{{part!r}: FOLDER}})"
    expected = entry.get("sha256")
    if not is_given and expected is None and Path(str(name)).exists():
        raise CheckpointError(
            f"{folder}: the manifest has no hash of the {part} backbone, and {name!r} is a folder "
            f"here, which may hold any weights. If it is the one, {advice}",
            reason="no_digests",
        )
    seen = fingerprint(name)
    if expected and seen is None:
        places = ", ".join(str(place) for place in backbone_places(entry, folder))
        raise CheckpointError(
            f"{folder}: the {part} backbone was {entry['name']!r}, which is not there any "
            f"more; looked for in {places}; {advice}",
            reason="backbone",
        )
    if expected and seen != expected:
        raise CheckpointError(
            f"{folder}: the {part} backbone in {name!r} has hash {str(seen)[:12]}, not "
            f"{expected[:12]}; the connector was trained on other weights",
            reason="backbone",
        )


def _load_llm(config: AVConfig, settings: LLMConfig, size: Size) -> Any:
    if "llm" not in config.trained:
        return load_llm(settings)[0]
    if settings.quantize:
        raise CheckpointError(
            f"quantize={settings.quantize!r}: this checkpoint holds the LLM's own trained weights, "
            "which are not quantised while they are read; leave quantize out"
        )
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"), no_larger_than(size, "the trained LLM"):
        inner = AutoConfig.for_model(**config.llm["config"])
        AutoModelForCausalLM.from_config(inner, trust_remote_code=False)
    inner = AutoConfig.for_model(**config.llm["config"])
    dtype = getattr(torch, settings.dtype)
    return AutoModelForCausalLM.from_config(
        inner, dtype=dtype, attn_implementation=attention(settings), trust_remote_code=False
    )


def _load_encoders(config: AVConfig, size: Size) -> dict[str, Any]:
    encoders = {}
    for stream, record in config.encoders.items():
        if f"encoders.{stream}" in config.trained or record.get("name") is None:
            try_encoder(stream, record, size)
            encoders[stream] = build_encoder(record)
        else:
            encoders[stream] = pretrained_encoder(stream, record, record["options"])
    return encoders


def _load_trained(model: Any, folder: Path) -> None:
    try:
        saved = load_file(folder / TRAINED)
    except SafetensorError as error:
        raise CheckpointError(f"{folder / TRAINED} is damaged: {error}; copy it again") from error
    check_finite(saved.items(), folder / TRAINED)
    expected = trained_state(model)
    missing = sorted(expected.keys() - saved.keys())
    unexpected = sorted(saved.keys() - expected.keys())
    common = sorted(expected.keys() & saved.keys())
    shapes = [name for name in common if saved[name].shape != expected[name].shape]
    if missing or unexpected or shapes:
        raise CheckpointError(
            f"{folder / TRAINED} does not fit: missing {missing[:3]}, unexpected {unexpected[:3]}, "
            f"other shape {shapes[:3]}; config.json and the weights belong to different models",
            reason="weights",
        )
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(saved[name])
