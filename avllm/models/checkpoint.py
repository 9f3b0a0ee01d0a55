"""Write and read a checkpoint folder: the model's trained weights, LoRA, the processor, the manifest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from avllm.config import LLMConfig
from avllm.models.checkpoint_format import (
    LORA,
    MANIFEST,
    TRAINED,
    CheckpointError,
    backbones,
    find_backbone,
    fingerprint,
    part_of,
    read_config,
    read_manifest_of,
    write_tensors,
)
from avllm.models.configuration_avllm import AVConfig
from avllm.models.encoders import build_encoder, pretrained_encoder
from avllm.models.llm import is_quantised, load_llm
from avllm.models.lora import activate, load_sets, save_sets, set_names


def mark_trained(model: Any) -> None:
    """Note the parts in which something trains now: from here on the checkpoint holds them whole.

    Raises:
        CheckpointError: one of them is quantised, which no checkpoint holds.
    """
    parts = set(model.config.trained)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" not in name:
            parts.add(part_of(name))
    if "llm" in parts and is_quantised(model.llm):
        raise CheckpointError(
            "weights of the LLM's own train, but it is quantised, which cannot be saved whole; "
            "train LoRA adapters alone in it, or leave llm.quantize out"
        )
    model.config.trained = sorted(parts)


def trained_state(model: Any) -> dict[str, Tensor]:
    """Every tensor of the parts that hold weights of their own, without LoRA's (they are saved in PEFT's form).

    PEFT wraps the LLM and the layers that it adapts; the names here are those without it.
    """
    parts = set(model.config.trained)
    return {
        name.replace("llm.base_model.model.", "llm.").replace(".base_layer.", "."): tensor
        for name, tensor in model.state_dict().items()
        if part_of(name) in parts and "lora_" not in name
    }


def save_model(model: Any, folder: str | Path) -> None:
    """Write config.json, trained.safetensors and lora/.

    Raises:
        CheckpointError: LoRA was merged in a way that the folder could not tell.
    """
    _check_lora(model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    # Tied weights share their storage, which safetensors refuses; a clone is the same numbers.
    state = {k: v.detach().cpu().clone().contiguous() for k, v in trained_state(model).items()}
    write_tensors(state, folder / TRAINED)
    if model.config.lora:
        save_sets(model.llm, folder / LORA)


def _check_lora(model: Any) -> None:
    sets = set_names(model.llm)
    if sorted(model.config.lora) != sorted(sets):
        raise CheckpointError(
            f"config.lora names the sets {sorted(model.config.lora)} and the LLM has {sorted(sets)}; "
            "put them on with add_lora() and make them part of the LLM with merge_lora()"
        )
    merged = any(getattr(module, "merged", False) for module in model.llm.modules()) if sets else False
    if merged and "llm" in model.config.trained:
        raise CheckpointError(
            "the LLM's own weights hold its adapters now (merge_adapter), and both would be saved; "
            "call llm.unmerge_adapter() first, or merge_lora() for good"
        )


def save_checkpoint(model: Any, processor: Any, folder: str | Path, stages: list[dict[str, Any]]) -> None:
    """Write the whole folder.

    Args:
        model, processor: what to save.
        folder: where to.
        stages: the chain, oldest first; each ``{"stage", "settings", "steps", "data", ...}``.
    """
    folder = Path(folder)
    save_model(model, folder)
    processor.save_pretrained(folder)
    manifest = {"format": 1, "backbones": backbones(model.config), "stages": stages}
    partial = folder / (MANIFEST + ".partial")
    partial.write_text(json.dumps(manifest, indent=2, ensure_ascii=False), encoding="utf-8")
    partial.replace(folder / MANIFEST)


def load_model(
    cls: Any,
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str | None = None,
    quantize: str | None = None,
    backbones: dict[str, str] | None = None,
) -> Any:
    """Read a checkpoint folder: backbones from where their names point, then the trained weights, then LoRA.

    Args:
        cls: the model class.
        folder: a checkpoint.
        device: where to put it.
        dtype: of the LLM, instead of the one it was trained with.
        quantize: ``4bit`` or ``8bit`` for the LLM, instead of what it was trained with.
        backbones: other places of backbones, ``{"llm": FOLDER, "encoders.audio": FOLDER}``.

    Raises:
        CheckpointError: missing or unexpected weights, or a backbone whose hash is not the recorded one.
    """
    folder = Path(folder)
    config = read_config(folder)
    _move_backbones(config, folder, backbones or {})
    settings = {k: v for k, v in config.llm.items() if k != "config"}
    settings |= {k: v for k, v in {"dtype": dtype, "quantize": quantize}.items() if v is not None}
    llm = _load_llm(config, LLMConfig(**settings))
    build: Any = cls  # AVLLM, whose module imports this one
    model = build(_without_lora(config), llm=llm, encoders=_load_encoders(config))
    _load_trained(model, folder)
    model.config.lora = AVConfig.from_pretrained(folder).lora
    if model.config.lora:
        model.llm = load_sets(model.llm, folder / LORA, list(model.config.lora))
        activate(model.llm, model.config.active_lora)
        model.attach_words()
    return model.freeze().eval().to(device)


def _without_lora(config: AVConfig) -> AVConfig:
    config.lora = {}  # they are built out of their own folders
    return config


def _move_backbones(config: AVConfig, folder: Path, places: dict[str, str]) -> None:
    recorded = read_manifest_of(folder)["backbones"] if (folder / MANIFEST).is_file() else {}
    records = {"llm": config.llm, **{f"encoders.{s}": r for s, r in config.encoders.items()}}
    unknown = sorted(set(places) - set(records))
    if unknown:
        raise CheckpointError(f"{folder} has no backbone {', '.join(unknown)}; it has {', '.join(records)}")
    for part, record in records.items():
        expected = recorded.get(part, {}).get("sha256")
        record["name"] = places.get(part, find_backbone(record.get("name"), folder, expected))
        if part in config.trained:
            continue
        seen = fingerprint(record["name"])
        if expected and seen is None:
            raise CheckpointError(
                f"{folder}: the {part} backbone was {record['name']!r}, which is not there any more; "
                f"say where it is: backbones={{{part!r}: FOLDER}}, or change its name in config.json"
            )
        if expected and seen != expected:
            raise CheckpointError(
                f"{folder}: the {part} backbone in {record['name']!r} has hash {str(seen)[:12]}, not {expected[:12]}; "
                "the connector was trained on other weights"
            )


def _load_llm(config: AVConfig, settings: LLMConfig) -> Any:
    if "llm" not in config.trained:
        return load_llm(settings)[0]
    if settings.quantize:
        raise CheckpointError(
            f"quantize={settings.quantize!r}: this checkpoint holds the LLM's own trained weights, which are not "
            "quantised while they are read; leave quantize out"
        )
    from transformers import AutoConfig, AutoModelForCausalLM

    inner = AutoConfig.for_model(**config.llm["config"])
    dtype = getattr(torch, settings.dtype)
    return AutoModelForCausalLM.from_config(inner, dtype=dtype, attn_implementation=settings.attention)


def _load_encoders(config: AVConfig) -> dict[str, Any]:
    encoders = {}
    for stream, record in config.encoders.items():
        if f"encoders.{stream}" in config.trained or record.get("name") is None:
            encoders[stream] = build_encoder(record)
        else:
            encoders[stream] = pretrained_encoder(stream, record, record["options"])
    return encoders


def _load_trained(model: Any, folder: Path) -> None:
    if not (folder / TRAINED).is_file():
        raise CheckpointError(f"{folder} has no {TRAINED}; expected the folder of a finished avllm run")
    try:
        saved = load_file(folder / TRAINED)
    except SafetensorError as error:
        raise CheckpointError(f"{folder / TRAINED} is damaged: {error}; copy it again") from error
    expected = trained_state(model)
    missing, unexpected = sorted(set(expected) - set(saved)), sorted(set(saved) - set(expected))
    shapes = [k for k in saved if k in expected and saved[k].shape != expected[k].shape]
    if missing or unexpected or shapes:
        raise CheckpointError(
            f"{folder / TRAINED} does not fit: missing {missing[:3]}, unexpected {unexpected[:3]}, "
            f"other shape {shapes[:3]}; "
            "config.json and the weights belong to different models"
        )
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(saved[name])
