"""Make the settings by which ``avllm data`` reads files and counts tokens."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from avllm.errors import UserError

if TYPE_CHECKING:
    from avllm.data.check.files import ExamineOptions
    from avllm.data.check.run import TokenCounter
    from avllm.models.processing_avllm import AVProcessor

Decode = Literal["headers", "sample", "full"]
DEFAULT_MAX_LENGTH = 2048  # tokens
NO_LIMIT = sys.maxsize  # tokens: for counting rows that training may find too long


def chosen_processor(
    preset: Path | None,
    overrides: list[str] | None,
    checkpoint: Path | None,
    allow_part: list[str] | None,
) -> AVProcessor | None:
    """Return the processor of a preset or checkpoint that rows are read with, if one is given.

    Raises:
        UserError: both are given, or overrides without a preset.
    """
    if preset is not None and checkpoint is not None:
        raise UserError(
            "both --preset and --checkpoint are given; expected one of the two", reason="two_models"
        )
    if overrides and preset is None:
        raise UserError(
            f"--set {overrides[0]} changes a preset, and no --preset is given; name one, "
            "or leave it out",
            reason="no_preset",
        )
    if preset is None and checkpoint is None:
        return None
    from avllm.config import load_config
    from avllm.config_errors import PresetPlaces

    config = load_config(preset, overrides) if preset is not None else None
    from avllm.log import hush_libraries  # heavy: it comes after the preset's own errors

    hush_libraries()
    if checkpoint is not None:
        from avllm.models.processing_avllm import AVProcessor

        return AVProcessor.from_pretrained(checkpoint, allow_parts=allow_part or ())
    assert preset is not None
    assert config is not None
    from avllm.models.building.described import stage_processor

    with PresetPlaces(preset, overrides or []).named():
        return stage_processor(config)


@dataclass(frozen=True)
class CheckSettings:
    """Settings by which files are read and tokens counted; ``tokens`` is None when none are."""

    options: ExamineOptions
    tokens: TokenCounter | None


def reading_of(
    processor: AVProcessor | None,
    tokenizer: str | None,
    max_length: int | None,
    timeout: float,
    workers: int,
    decode: Decode,
) -> CheckSettings:
    """Return the settings of a model's processor, or of a tokenizer, or of neither.

    Raises:
        UserError: options that exclude each other, or of which one needs another.
    """
    if processor is None:
        return _plain_reading(tokenizer, max_length, timeout, workers, decode)
    from avllm.data.check.files import ExamineOptions

    if tokenizer is not None:
        raise UserError(
            "--tokenizer is given beside a model, which has one; leave it out",
            reason="two_tokenizers",
        )
    if decode == "headers":
        raise UserError(
            "--decode headers is given beside a model, but headers do not say how many tokens a "
            "file becomes: rows that are too long would pass. Take --decode sample, or leave the "
            "model out",
            reason="headers",
        )
    from avllm.inference.row_tokens import ProcessorTokens, reading

    processor.timeout = timeout
    processor.max_length = max_length or processor.max_length
    options = ExamineOptions(decode, processor, reading(processor), workers)
    return CheckSettings(options, ProcessorTokens(processor))


def _plain_reading(
    tokenizer: str | None, max_length: int | None, timeout: float, workers: int, decode: Decode
) -> CheckSettings:
    """Return the settings without a model."""
    from avllm.data.check.files import ExamineOptions
    from avllm.data.check.uses import PlainReader

    options = ExamineOptions(decode, PlainReader(timeout=timeout), workers=workers)
    if tokenizer is not None:
        return CheckSettings(options, _text_tokens(tokenizer, max_length or DEFAULT_MAX_LENGTH))
    if max_length not in (None, NO_LIMIT):
        raise UserError(
            f"--max-length {max_length} is given, and nothing that counts tokens; expected "
            "--preset, --checkpoint or --tokenizer beside it",
            reason="no_tokens",
        )
    return CheckSettings(options, None)


def _text_tokens(name: str, max_length: int) -> TokenCounter:
    from avllm.log import hush_libraries

    hush_libraries()
    from transformers import AutoTokenizer

    from avllm.inference.row_tokens import TextTokens

    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    return TextTokens(tokenizer, max_length)
