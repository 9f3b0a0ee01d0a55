"""Generate answers: one place for chat, batch and evaluation, so that all three answer the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import TypeAdapter
from torch import Tensor

from avllm.config_values import PartSpec
from avllm.data.row import Row
from avllm.errors import UserError, one_line
from avllm.registry import build, suggest
from avllm.yaml_files import parse_yaml

if TYPE_CHECKING:
    from avllm.models.modeling_avllm import AVLLM
    from avllm.models.processing_avllm import AVProcessor


@dataclass(frozen=True)
class Generation:
    """Settings by which an answer is chosen.

    Attributes:
        max_new_tokens: longest answer, in tokens.
        temperature: 0 = greedy, the same answer each time; above 0 tokens are drawn.
        top_p: draw from the most likely tokens that hold this share of the probability
            (arXiv 1904.09751); only when ``temperature`` is above 0.
        decoding: ``{"type", **options}`` of a decoder, or None.

    Raises:
        UserError: a value out of range. UnknownPartError: no such decoder or option.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    decoding: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise _out_of_range("max_new_tokens", self.max_new_tokens, "at least 1")
        if self.temperature < 0:
            raise _out_of_range("temperature", self.temperature, "0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise _out_of_range("top_p", self.top_p, "above 0 and at most 1")
        if self.decoding is not None:
            build("decoders", self.decoding)

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Generation:
        """Return the settings of options by name.

        Raises:
            UserError: ``unknown_option``; names the nearest setting.
        """
        names = [field.name for field in fields(cls)]
        for name in options:
            if name not in names:
                raise UserError(
                    f"an answer has no setting {name!r}; {suggest(name, names)}",
                    reason="unknown_option",
                )
        return cls(**options)

    def settings(self) -> dict[str, Any]:
        """Return every setting that the answer depends on, JSON-able."""
        return asdict(self)

    def arguments(self, model: AVLLM, processor: AVProcessor) -> dict[str, Any]:
        """Return the keyword arguments of ``model.generate``.

        An LLM's generation_config may set a repetition penalty or a top-k. Both are switched off,
        so that the answer depends on these settings alone.
        """
        arguments: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": self.temperature > 0,
            "repetition_penalty": 1.0,
            "pad_token_id": processor.tokenizer.pad_token_id,
            "eos_token_id": stop_ids(model, processor),
        }
        if self.temperature > 0:
            arguments["temperature"] = self.temperature
            arguments["top_p"] = self.top_p
            arguments["top_k"] = 0
        if self.decoding is not None:
            arguments["decoder"] = build("decoders", self.decoding)
        return arguments


def _out_of_range(setting: str, value: float, expected: str) -> UserError:
    return UserError(f"{setting} is {value}; expected {expected}", reason=setting)


def read_decoding(text: str | None) -> dict[str, Any] | None:
    """Return the decoder that a command line's YAML names.

    Args:
        text: ``{type: contrastive, alpha: 1}``, or the type alone; None or blank for no decoder.

    Raises:
        UserError: no YAML, or no mapping. UnknownPartError: no such decoder or option.
    """
    if text is None or not text.strip():
        return None
    expected = "expected {type: NAME, option: value}"
    try:
        spec = parse_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(
            f"decoding: {text!r} is no YAML ({one_line(error)}); {expected}", reason="no_yaml"
        ) from error
    if isinstance(spec, str):
        spec = {"type": spec}
    if not isinstance(spec, dict):
        raise UserError(f"decoding: {text!r}; {expected}", reason="no_mapping")
    if not all(isinstance(key, str) for key in spec):
        raise UserError(
            f"decoding: {text!r} has an option whose name is no text; {expected}",
            reason="option_name",
        )
    decoding: dict[str, Any] = TypeAdapter(PartSpec).validate_python(spec)
    build("decoders", decoding)
    return decoding


def stop_ids(model: AVLLM, processor: AVProcessor) -> list[int]:
    """Return the ids of the tokens that end an answer.

    These are the tokenizer's, the LLM's, and the one that the chat template writes after a turn.
    The last matters for base models with a chat template: their end-of-sequence token is not the
    one that ends a turn, and a model that learned to end turns would talk on.
    """
    configured = model.llm.generation_config.eos_token_id  # an id, a list of ids, or None
    if not isinstance(configured, list):
        configured = [configured]
    ids = {processor.tokenizer.eos_token_id, *configured, _end_of_turn(processor)}
    ids.discard(None)
    return sorted(int(token_id) for token_id in ids)


def _end_of_turn(processor: AVProcessor) -> int | None:
    """Return the special token that the chat template writes after an answer, or None."""
    tokenizer = processor.tokenizer
    after_answer = processor.chat_text.after_answer()
    if not after_answer:
        return None
    token_ids = tokenizer(after_answer, add_special_tokens=False)["input_ids"]
    if not token_ids:
        return None
    first = int(token_ids[0])
    token = tokenizer.added_tokens_decoder.get(first)
    return first if token is not None and token.special else None


@dataclass(frozen=True)
class GeneratedAnswer:
    """The text of an answer, and warnings about it in words."""

    text: str
    warnings: tuple[str, ...] = ()


def answer_rows(
    model: AVLLM, processor: AVProcessor, rows: Sequence[Row], generation: Generation | None = None
) -> list[str]:
    """Answer prompts (``processor.row(..., answer=False)``) in one batch, in the order given.

    Rows are padded on the left, so that greedy answers are those that each row would get alone.

    Returns:
        One answer a row, stripped of surrounding white space.
    """
    ids = generate_ids(model, processor, rows, generation or Generation())
    return [answer.text for answer in answers_of(processor, rows, ids)]


def generate_ids(
    model: AVLLM, processor: AVProcessor, rows: Sequence[Row], generation: Generation
) -> Tensor:
    """Return the token ids of the answers to R prompts, ``(R, L)``, see :func:`answer_rows`."""
    batch = processor.collate(list(rows), padding_side="left").to(model.device)
    return model.generate(batch, **generation.arguments(model, processor))


def answers_of(processor: AVProcessor, rows: Sequence[Row], ids: Tensor) -> list[GeneratedAnswer]:
    """Return the answers that generated ids ``(R, L)`` write, of R rows."""
    texts = processor.decode(ids, [row.duration for row in rows])
    written = processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
    answers = []
    for text, whole in zip(texts, written, strict=True):
        answers.append(GeneratedAnswer(text, processor.chat_text.warnings_about(whole)))
    return answers
