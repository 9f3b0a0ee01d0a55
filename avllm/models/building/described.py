"""Make the processor of a model that is only described: rows are made without loading the LLM."""

from __future__ import annotations

from transformers import AutoConfig

from avllm.config import RunConfig
from avllm.config_model import ModelConfig
from avllm.errors import loading
from avllm.models.building.extend import extend_processor
from avllm.models.building.placeholders import embedding_width, load_tokenizer
from avllm.models.checkpoint_format import is_checkpoint
from avllm.models.configuration_avllm import AVConfig
from avllm.models.encoders import load_encoder
from avllm.models.processing_avllm import AVProcessor
from avllm.models.words import load_words


def stage_processor(config: RunConfig) -> AVProcessor:
    """Return the processor with which a stage reads its rows.

    Raises:
        FileNotFoundError: ``init`` is no checkpoint (yet).
        UserError: a backbone is not where its name says.
    """
    if config.init is not None:
        if not is_checkpoint(config.init):
            raise FileNotFoundError(
                f"init: {config.init} is no checkpoint (yet), so there is no model to "
                "read rows as; train the stage before first, or give the preset of stage 1, "
                "which describes the model (and --max-length for this one)"
            )
        processor = AVProcessor.from_pretrained(config.init, allow_parts=config.allow_parts)
        if config.extend is not None:
            processor = extend_processor(processor, config.extend)
    else:
        assert config.model is not None  # RunConfig requires one of the two
        processor = described_processor(config.model)
    processor.max_length = config.data.max_length
    processor.timeout = config.data.timeout
    return processor


def described_processor(description: ModelConfig) -> AVProcessor:
    """Make the processor of a preset's ``model`` section, from the LLM's tokenizer and config."""
    tokenizer, media_token_ids = load_tokenizer(description)
    loaded = {stream: load_encoder(stream, spec) for stream, spec in description.encoders.items()}
    records = {str(stream): record for stream, (_, record) in loaded.items()}
    with loading("the LLM's config", description.llm.name):
        llm = AutoConfig.from_pretrained(
            description.llm.name, revision=description.llm.revision, trust_remote_code=False
        )
    config = AVConfig.of(
        description,
        {**description.llm.model_dump(), "config": llm.to_dict()},
        records,
        media_token_ids,
    )
    config.words = load_words(tokenizer, description)
    width = embedding_width(llm)
    encoders = {stream: encoder for stream, (encoder, _) in loaded.items()}
    return AVProcessor.from_encoders(encoders, tokenizer, config, width)
