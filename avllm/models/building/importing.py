"""Write a checkpoint out of published weights: backbones, connector, LLM."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from avllm.config_model import ModelConfig
from avllm.config_peft import LoraConfig
from avllm.data.store.storage import sha256
from avllm.errors import UserError, loading, one_line
from avllm.log import logger
from avllm.models.building.placeholders import embedding_width, load_tokenizer
from avllm.models.checkpoint import save_checkpoint
from avllm.models.checkpoint_format import IMPORT, write_tensors
from avllm.models.encoders import output_widths, widths_of
from avllm.models.importing.base import (
    AdapterSource,
    BackboneFiles,
    Converted,
    Dims,
    Importer,
)
from avllm.models.modeling_avllm import AVLLM
from avllm.models.processing_avllm import AVProcessor
from avllm.models.whole_folder import PARTIAL
from avllm.registry import check_options, load, make
from avllm.weights import check_finite

LOG = logger(__name__)
BACKBONES = "backbones"
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def import_checkpoint(
    name: str,
    files: Mapping[str, str],
    *,
    llm: str | Path,
    output: str | Path,
    dims: str | Path | None = None,
    allow: Sequence[str] = (),
) -> Path:
    """Make a checkpoint out of the files that another project publishes.

    Args:
        name: of the importer.
        files: the importer's files, by option.
        llm: folder or hub name of the language model.
        output: the checkpoint; its backbones are written into it. Made; it must not be there.
        dims: JSON file of numbers that no tensor shows; None for those of the published model.
        allow: regular expressions of tensors that may be missing or left over.

    Returns:
        the checkpoint's folder.

    Raises:
        UserError: a file or a tensor is missing, left over or of another shape, sizes contradict
            each other, or the output exists.
    """
    part = load("importers", name)
    check_options(part, files, f"importer {name!r}")
    importer: Importer = make(part, **files)
    numbers = Dims(importer.defaults, _read_dims(dims))
    with _new_folder(Path(output)) as partial:
        converted = importer.convert(numbers, allow)
        weights = _connector_weights(converted, str(llm), numbers)
        model, processor = _compose(converted, str(llm), partial)
        _fill_connector(model, weights)
        if converted.lora is not None:
            _add_lora(model, converted.lora)
        for stream in converted.backbones:
            model.config.encoders[stream]["name"] = f"{BACKBONES}/{stream}"
        record = {
            "stage": IMPORT,
            "importer": name,
            "steps": 0,
            "settings": {"files": dict(files), "dims": numbers.values, "allow": list(allow)},
            "data": {str(path): sha256(path) for path in importer.sources},
        }
        save_checkpoint(model, processor, partial, [record])
    return Path(output)


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder that gets its name when the block ends, and goes if the block fails.

    Raises:
        UserError: ``exists``.
    """
    if folder.exists():
        raise UserError(
            f"{folder} exists already; expected a new folder. Remove it, or choose another",
            reason="exists",
        )
    partial = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    partial.rename(folder)


def _read_dims(path: str | Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    expected = 'expected a JSON object like {"vit": {"heads": 16}}'
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: {one_line(error)}; {expected}", reason="dims") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}; {expected}", reason="dims")
    return content


def _connector_weights(converted: Converted, llm: str, dims: Dims) -> dict[str, Tensor]:
    """Return the connector's weights; everything is checked before a file is written.

    Raises:
        UserError: a tensor is missing, left over or of another shape, or the LLM's width is not the
            one that was asked for.
    """
    widths: dict[str, int] = {}
    for stream, section in converted.encoders.items():
        widths |= _widths(stream, section, converted.backbones.get(stream))
    width = embedding_width(_llm_config(llm))
    dims.compare({"llm_hidden": width})
    weights = converted.weights(widths, width)
    for adapter in converted.adapters:
        if converted.lora is None or adapter.file is not converted.lora.file:
            adapter.file.refuse_rest()
    check_finite(weights.items(), "the published connector")
    return weights


def _widths(stream: str, section: dict[str, Any], files: BackboneFiles | None) -> dict[str, int]:
    """Return the width of each stream of an encoder that is converted, or that is named."""
    if files is None:
        return output_widths(stream, section)
    options = {key: value for key, value in section.items() if key not in ("type", "medium")}
    with torch.device("meta"):
        return widths_of({stream: make(load("encoders", section["type"]), files.config, **options)})


def _compose(converted: Converted, llm: str, folder: Path) -> tuple[AVLLM, AVProcessor]:
    """Write the backbones, and load the model on them; its connector is random."""
    encoders = {}
    for stream, section in converted.encoders.items():
        encoders[stream] = dict(section)
    for stream, files in converted.backbones.items():
        place = folder / BACKBONES / stream
        _write_backbone(files, place)
        encoders[stream]["name"] = str(place)
    kind: Any = _llm_config(llm).dtype
    dtype = DTYPES.get(kind, "float32")
    description = ModelConfig.model_validate(
        {
            "llm": {"name": llm, "dtype": dtype},
            "encoders": encoders,
            "connector": converted.connector,
            **converted.model,
        }
    )
    tokenizer, token_ids = load_tokenizer(description)
    model = AVLLM.from_backbones(description, token_ids)
    return model, AVProcessor.from_model(model, tokenizer)


def _fill_connector(model: AVLLM, weights: Mapping[str, Tensor]) -> None:
    """Load the connector's weights. What is not there was allowed by name, and stays random."""
    left = model.connector.load_state_dict(dict(weights), strict=False).missing_keys
    for name in left:
        LOG.warning("connector.%s is in no file and stays random", name)


def _add_lora(model: AVLLM, source: AdapterSource) -> None:
    """Put a LoRA set on the LLM, with the published weights.

    Raises:
        PublishedError: a tensor is missing, left over or of another shape.
    """
    model.add_lora(LoraConfig(**source.spec))
    own = {name: x for name, x in model.llm.named_parameters() if "lora_" in name}
    taken = source.file.take(own, source.published)
    source.file.refuse_rest()
    check_finite(taken.items(), source.file.path)
    with torch.no_grad():
        for name, x in taken.items():
            own[name].copy_(x)


def _llm_config(llm: str) -> PretrainedConfig:
    with loading("the LLM's config", llm):
        config: PretrainedConfig = AutoConfig.from_pretrained(llm, trust_remote_code=False)
    return config


def _write_backbone(files: BackboneFiles, folder: Path) -> None:
    """Write a backbone in the form of transformers."""
    folder.mkdir(parents=True)
    files.config.save_pretrained(folder)
    state = {name: x.to(files.config.dtype).contiguous() for name, x in files.state.items()}
    write_tensors(state, folder / "model.safetensors")
    text = json.dumps(files.preprocessing, indent=2)
    (folder / "preprocessor_config.json").write_text(text + "\n", encoding="utf-8")
