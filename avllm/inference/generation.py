"""How answers are generated: one place for chat, batch and evaluation, so that all three say the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import TypeAdapter

from avllm.config import PartSpec
from avllm.data.row import Row
from avllm.errors import UserError
from avllm.registry import build

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from avllm.models.modeling_avllm import AVLLM
    from avllm.models.processing_avllm import AVProcessor


@dataclass(frozen=True)
class Generation:
    """How an answer is chosen.

    Attributes:
        max_new_tokens: longest answer, in tokens.
        temperature: 0 = greedy, the same answer each time; above 0 tokens are drawn.
        top_p: draw from the most likely tokens that hold this share of the probability (arXiv 1904.09751); only when
            ``temperature`` is above 0.
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
            raise UserError(f"max_new_tokens is {self.max_new_tokens}; expected at least 1")
        if self.temperature < 0:
            raise UserError(f"temperature is {self.temperature}; expected 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; expected above 0 and at most 1")
        if self.decoding is not None:
            build("decoders", self.decoding)

    def settings(self) -> dict[str, Any]:
        """Everything that decides the answer, JSON-able."""
        return asdict(self)

    def arguments(self, model: AVLLM, processor: AVProcessor) -> dict[str, Any]:
        """The keyword arguments of ``model.generate``.

        An LLM's own generation_config may bring a repetition penalty or a top-k of its own; both are switched off, so
        that these three numbers are all there is.
        """
        arguments: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": self.temperature > 0,
            "repetition_penalty": 1.0,
            "pad_token_id": processor.tokenizer.pad_token_id,
            "eos_token_id": stop_ids(model, processor.tokenizer),
        }
        if self.temperature > 0:
            arguments |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        if self.decoding is not None:
            arguments["decoder"] = build("decoders", self.decoding)
        return arguments


def read_decoding(text: str | None) -> dict[str, Any] | None:
    """Return the decoder that a command line's YAML names: ``{type: contrastive, alpha: 1}``, or the type alone.

    Raises:
        UserError: no YAML, or no mapping. UnknownPartError: no such decoder or option.
    """
    if text is None or not text.strip():
        return None
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"decoding: {text!r} is no YAML ({error}); expected {{type: NAME, option: value}}") from error
    spec = {"type": value} if isinstance(value, str) else value
    if not isinstance(spec, dict):
        raise UserError(f"decoding: {text!r}; expected {{type: NAME, option: value}}")
    if not all(isinstance(key, str) for key in spec):
        raise UserError(f"decoding: {text!r}; expected names of options, {{type: NAME, option: value}}")
    decoding: dict[str, Any] = TypeAdapter(PartSpec).validate_python(spec)
    build("decoders", decoding)
    return decoding


def stop_ids(model: AVLLM, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that end an answer: the tokenizer's, the LLM's own, and what the chat template writes behind a turn.

    The last matters for base models with a chat template: their end-of-sequence token is not the one that ends a turn,
    and a model that learned to end turns would talk on.
    """
    own = model.llm.generation_config.eos_token_id
    ids = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    turns = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "\u0001"}]
    behind = str(tokenizer.apply_chat_template(turns, tokenize=False)).rpartition("\u0001")[2]
    first = tokenizer(behind, add_special_tokens=False)["input_ids"][:1] if behind else []
    known = tokenizer.added_tokens_decoder
    return sorted({int(i) for i in ids} | {i for i in first if i in known and known[i].special})


def answer_rows(
    model: AVLLM, processor: AVProcessor, rows: Sequence[Row], generation: Generation | None = None
) -> list[str]:
    """Answer prompts (``processor.row(..., answer=False)``) in one batch, in the order given.

    Rows are padded on the left, so that greedy answers are those that each row would get alone.

    Returns:
        One answer a row, stripped of surrounding white space.
    """
    batch = processor.collate(list(rows), padding_side="left").to(model.device)
    arguments = (generation or Generation()).arguments(model, processor)
    return processor.decode(model.generate(batch, **arguments), [row.duration for row in rows])
