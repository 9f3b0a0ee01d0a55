"""Read the small files of a checkpoint folder, each checked before it is used.

The files may be damaged, of another program, or written by somebody else: every fault is one
:class:`CheckpointError`, and nothing in them can make the reader run code or fetch anything.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import PROCESSOR_NAME

from avllm.config_model import SamplingConfig
from avllm.config_peft import METHODS
from avllm.encoders.base import preprocessor_from_settings
from avllm.errors import UserError, one_line
from avllm.models.checkpoint_format import MANIFEST, OLD_PROCESSOR_NAME, TRAINED, CheckpointError
from avllm.models.configuration_avllm import AVConfig
from avllm.models.loading.digests import PROCESSOR_FILES, check_files
from avllm.models.loading.foreign_parts import check_parts, check_preprocessors
from avllm.weights import ANY_SIZE, Size, check_settings, size_of

CONFIG_NAME = "config.json"
MOST_TOKENS = 2**22
"""More than any vocabulary has; a table over all ids is made for added words."""
_HUB_ARGUMENTS = {"_from_auto", "revision", "token", "trust_remote_code"}


_TokenId = Annotated[int, Field(ge=0, lt=MOST_TOKENS)]


class _StrictRecord(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")
    type: str


class _LLM(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")
    name: str
    revision: str | None = None
    config: dict[str, Any]


class _Encoder(_StrictRecord):
    medium: str
    type: str
    name: str | None = None
    revision: str | None = None
    dtype: str | None = None
    config: dict[str, Any]
    options: dict[str, Any]


class _AdapterSet(BaseModel):
    """A set of LoRA has a rank, one of another method of PEFT a type; the rest is checked later."""

    model_config = ConfigDict(strict=True, extra="allow")
    type: str | None = None
    r: int | None = Field(None, gt=0)
    alpha: float | None = None
    dropout: float | None = Field(None, ge=0, lt=1)
    targets: str | list[str]
    active: bool

    @model_validator(mode="after")
    def _is_of_a_method(self) -> _AdapterSet:
        lacking = self.type is None and None in (self.r, self.alpha, self.dropout)
        if lacking or self.type not in (None, *METHODS):
            raise ValueError(
                f"expected r, alpha and dropout of LoRA, or a type of {', '.join(METHODS)}"
            )
        return self


class _ConfigFile(BaseModel):
    """The fields of ``config.json``; transformers adds some that are not ours."""

    model_config = ConfigDict(strict=True, extra="ignore")
    llm: _LLM
    encoders: dict[str, _Encoder] = Field(min_length=1)
    connector: list[_Part] = Field(min_length=1)
    layout: _Part
    fusion: _Part | None = None
    sampling: dict[str, Any]
    selector: _Part | None = None
    media_token_ids: dict[str, _TokenId]
    lora: dict[str, _AdapterSet] = Field(default_factory=dict)
    trained: list[str]
    system: str | None = None
    media_text: dict[str, str] = Field(default_factory=dict)
    time_codec: _Part
    words: dict[str, _TokenId] = Field(default_factory=dict)


class _ProcessorFile(BaseModel):
    """The fields of ``processor_config.json``."""

    model_config = ConfigDict(strict=True, extra="ignore")
    preprocessors: dict[str, dict[str, Any]]
    widths: dict[str, int]
    llm_dim: int = Field(gt=0)
    max_length: int = Field(gt=0)
    timeout: float = Field(gt=0)


@dataclass(frozen=True)
class SavedProcessor:
    """Hold the arguments of an ``AVProcessor``, as a checkpoint has them."""

    tokenizer: PreTrainedTokenizerBase
    preprocessors: dict[str, Any]
    config: AVConfig
    widths: dict[str, int]
    llm_dim: int
    max_length: int
    timeout: float
    size: Size


def refuse_unknown(arguments: Collection[str]) -> None:
    """Refuse arguments of ``from_pretrained`` that are neither a processor's nor the hub's.

    Raises:
        TypeError: names them.
    """
    unknown = sorted(set(arguments) - _HUB_ARGUMENTS)
    if unknown:
        raise TypeError(
            f"AVProcessor.from_pretrained takes max_length, timeout and allow_parts, not {unknown}"
        )


@contextmanager
def reading(folder: str | Path, what: str) -> Iterator[None]:
    """Report any failure to read or build a part of a checkpoint as one line.

    Args:
        folder: the checkpoint.
        what: the part that is read, in the user's words.

    Raises:
        CheckpointError: the block failed.
    """
    try:
        yield
    except (UserError, ImportError):
        raise
    except Exception as error:
        raise CheckpointError(
            f"{folder}: {what} cannot be read ({one_line(error)}); expected the files of one avllm "
            "checkpoint. Copy it again, or compare it with `avllm ckpt verify`",
            reason="damaged",
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: there is no such file, or it holds something else.
    """
    if not path.is_file():
        raise CheckpointError(
            f"{path.parent} has no {path.name}; expected an avllm checkpoint folder",
            reason="missing",
        )
    with reading(path.parent, path.name):
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds {type(content).__name__}; expected a JSON object. Copy it again",
            reason="damaged",
        )
    return content


def read_config(folder: Path) -> AVConfig:
    """Read the config.json of a checkpoint.

    Raises:
        CheckpointError: there is none, it is another model's, or a field is not what it must be.
    """
    path = folder / CONFIG_NAME
    content = read_json(path)
    kind = content.get("model_type")
    if kind != AVConfig.model_type:
        raise CheckpointError(
            f"{path} is of a {kind} model; expected an avllm checkpoint folder", reason="foreign"
        )
    fields = _validated(_ConfigFile, content, path)
    with reading(folder, f"{CONFIG_NAME}, sampling"):
        SamplingConfig.model_validate(fields.sampling)
    for record in [fields.llm, *fields.encoders.values()]:
        check_settings(record.config, path)
    with reading(folder, CONFIG_NAME):
        return AVConfig.from_dict(content)


def _validated(schema: Any, content: dict[str, Any], path: Path) -> Any:
    """Check the types of a file's fields; return them.

    Raises:
        CheckpointError: names the first field that is not what it must be.
    """
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise CheckpointError(
            f"{path}: {field}: {first['msg'].lower()}; the file is damaged or of another program. "
            "Copy it again",
            reason="damaged",
        ) from error


def read_processor(folder: Path, allow_parts: Collection[str]) -> SavedProcessor:
    """Read the tokenizer, preprocessors and sizes of a checkpoint.

    Raises:
        CheckpointError: a file is missing, damaged, or of another kind of model.
        ForeignPartError: a part from outside of the package is named that is not allowed.
    """
    path = folder / PROCESSOR_NAME
    if not path.is_file() and (folder / OLD_PROCESSOR_NAME).is_file():
        raise CheckpointError(
            f"{folder} was written by an earlier avllm: rename its {OLD_PROCESSOR_NAME} to "
            f"{PROCESSOR_NAME}"
        )
    if (folder / MANIFEST).is_file():  # a processor may be saved alone
        check_files(folder, (CONFIG_NAME, *PROCESSOR_FILES))
    content = read_json(path)
    config = read_config(folder)
    check_parts(config, folder, allow_parts)
    fields = _validated(_ProcessorFile, content, path)
    check_preprocessors(fields.preprocessors, folder, allow_parts)
    with reading(folder, PROCESSOR_NAME):
        preprocessors = {s: preprocessor_from_settings(v) for s, v in fields.preprocessors.items()}
    if sorted(preprocessors) != sorted(config.encoders):
        raise CheckpointError(
            f"{path} has preprocessors of {sorted(preprocessors)}, {CONFIG_NAME} has encoders of "
            f"{sorted(config.encoders)}; the files belong to different checkpoints. Copy it again",
            reason="damaged",
        )
    return SavedProcessor(
        _saved_tokenizer(folder),
        preprocessors,
        config,
        fields.widths,
        fields.llm_dim,
        fields.max_length,
        fields.timeout,
        size_of([folder / TRAINED]) if (folder / TRAINED).is_file() else ANY_SIZE,
    )


def _saved_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint from its files alone."""
    path = folder / "tokenizer_config.json"
    check_settings(read_json(path), path, numbers=False)
    with reading(folder, "the tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder.absolute()), trust_remote_code=False, local_files_only=True
        )
    return tokenizer
