"""Settings of a model: LLM, encoders, connector."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, JsonValue, model_validator

from avllm.config_values import (
    AdapterSpec,
    EncoderSpec,
    FusionSpec,
    LayoutSpec,
    Number,
    Section,
    SelectorSpec,
    TimeCodecSpec,
    Whole,
)
from avllm.streams import check_stream


class LLMConfig(Section):
    """The language model: any ``AutoModelForCausalLM``."""

    name: str = Field(description="hub name or folder")
    revision: str | None = Field(None, description="commit, branch or tag on the hub; the newest")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of the frozen weights in memory"
    )
    quantize: Literal["4bit", "8bit"] | None = Field(
        None, description="bits of the frozen weights (bitsandbytes); null for none"
    )
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto",
        description="implementation of attention; auto: sdpa where the LLM has it, else eager",
    )
    chat_template_kwargs: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="arguments of the chat template, for example {enable_thinking: false}",
    )
    date: str | None = Field(
        None,
        pattern=r"^\d{4}-\d\d-\d\d$",
        description="day that a chat template writes as today; the day of the composition",
    )


MOST_FRAMES = 16_384  # of a clip; at 224 x 224 an encoder takes 10 GB of them
MOST_FPS = 1_000
MOST_SIDE = 8_192  # pixels of a frame that is read


class SamplingConfig(Section):
    """Choice of a video's frames: ``num_frames`` spread evenly, or ``fps`` with a cap."""

    num_frames: Whole | None = Field(
        None, gt=0, le=MOST_FRAMES, description="frames of a clip, spread evenly"
    )
    fps: Number | None = Field(None, gt=0, le=MOST_FPS, description="frames a second")
    max_frames: Whole | None = Field(
        None, gt=0, le=MOST_FRAMES, description="most frames of a clip, with fps"
    )
    short_side: Whole | None = Field(
        None,
        gt=0,
        le=MOST_SIDE,
        description="pixels that larger pictures are shrunk to while decoding",
    )

    @model_validator(mode="after")
    def _one_way(self) -> SamplingConfig:
        if (self.num_frames is None) == (self.fps is None):
            raise ValueError(
                f"num_frames is {self.num_frames} and fps is {self.fps}; "
                "give exactly one of the two"
            )
        return self


def check_encoders(encoders: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Check the names and mediums of encoders by stream.

    Raises:
        ValueError: a name that no stream may have, or a stream without a medium.
    """
    for stream, spec in encoders.items():
        check_stream(stream, spec)
    return encoders


Encoders = Annotated[dict[str, EncoderSpec], AfterValidator(check_encoders)]
"""By stream; one that is not called ``video`` or ``audio`` names its ``medium``."""


class ModelConfig(Section):
    """The parts that the model is made of."""

    llm: LLMConfig = Field(description="the language model")
    encoders: Encoders = Field(
        min_length=1, description="by stream: video, audio, or a name with its medium"
    )
    connector: list[AdapterSpec] = Field(
        min_length=1, description="adapters between encoders and LLM, in their order"
    )
    layout: LayoutSpec = Field(
        default_factory=lambda: {"type": "concat"},
        description="order of the streams' tokens in the LLM's sequence",
    )
    time_codec: TimeCodecSpec = Field(
        default_factory=lambda: {"type": "seconds"},
        description="form in which the LLM reads and writes times",
    )
    fusion: FusionSpec | None = Field(
        None, description="lets streams act inside the LLM, beside its sequence"
    )
    sampling: SamplingConfig = Field(
        default_factory=lambda: SamplingConfig.model_validate({"num_frames": 8}),
        description="choice of a video's frames",
    )
    selector: SelectorSpec | None = Field(
        None, description="chooses frames by the question, before they are encoded"
    )
    system: str | None = Field(None, description="system prompt put before chats that bring none")
    media_text: dict[Literal["video", "audio", "image"], str] = Field(
        default_factory=dict,
        description="text around the tokens of a media part, for example '<Video>{media}</Video>'",
    )


class ExtendConfig(Section):
    """The parts that a stage adds to the model it starts from, whose weights stay the same."""

    encoders: Encoders = Field(default_factory=dict, description="encoders of new streams")
    connector: list[AdapterSpec] = Field(
        min_length=1,
        description="adapters, after those of the model, or each at its `place` in the longer list",
    )
    layout: LayoutSpec | None = Field(None, description="replaces the model's")
