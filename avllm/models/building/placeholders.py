"""Find the streams that need a placeholder in the vocabulary, by a connector without weights."""

from __future__ import annotations

from typing import cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from avllm.config_model import ModelConfig
from avllm.errors import UserError, loading
from avllm.fusions.base import consumed_streams
from avllm.models.connector import Connector
from avllm.models.encoders import output_widths
from avllm.models.words import add_to_tokenizer, needed_words


def placeholder_streams(description: ModelConfig) -> list[str]:
    """Return the streams that reach the LLM's sequence: of encoders, then of adapters.

    Streams that a fusion consumes are not among them.

    Raises:
        UserError: parts that do not exist or do not fit together, or a backbone that is not where
            its name says.
    """
    widths: dict[str, int] = {}
    for stream, spec in sorted(description.encoders.items()):
        widths |= output_widths(stream, spec)
    with loading("the LLM's config", description.llm.name, "model.llm.name"):
        llm = AutoConfig.from_pretrained(
            description.llm.name, revision=description.llm.revision, trust_remote_code=False
        )
    with torch.device("meta"):
        connector = Connector(description.connector, widths, embedding_width(llm))
    made = [s for s in connector.out_streams if s not in description.encoders and "." not in s]
    consumed = consumed_streams(description.fusion)
    return [stream for stream in [*description.encoders, *made] if stream not in consumed]


def embedding_width(llm: PretrainedConfig) -> int:
    """Return the width of an LLM's input embeddings, by its config."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(llm, trust_remote_code=False)
        return int(model.get_input_embeddings().embedding_dim)


def load_tokenizer(description: ModelConfig) -> tuple[PreTrainedTokenizerBase, dict[str, int]]:
    """Load the LLM's tokenizer and add a placeholder for each stream and the time codec's words.

    Placeholder ids may lie after the LLM's vocabulary: media replace them before ids are embedded.

    Returns:
        the tokenizer, and the placeholder ids by stream.

    Raises:
        UserError: the tokenizer cannot be loaded or has no end-of-sequence token.
    """
    with loading("the LLM's tokenizer", description.llm.name, "model.llm.name"):
        tokenizer = AutoTokenizer.from_pretrained(
            description.llm.name, revision=description.llm.revision, trust_remote_code=False
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {description.llm.name!r} has no end-of-sequence token; answers "
            "could not end"
        )
    names = placeholder_streams(description)
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{n}|>" for n in names]})
    words = needed_words(description)
    if words:
        add_to_tokenizer(tokenizer, words)
    return tokenizer, {n: cast(int, tokenizer.convert_tokens_to_ids(f"<|{n}|>")) for n in names}
