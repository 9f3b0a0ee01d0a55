"""Every setting of a run, typed, in one place. YAML plus ``key=value`` overrides; an unknown key names the right one.

The options of a part (encoder, adapter, layout, objective) are that part's own keyword arguments: they are checked
against its constructor and stand nowhere a second time.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from avllm.config_errors import explain
from avllm.errors import UserError
from avllm.streams import check_stream
from avllm.yaml_files import apply_override, read_mapping


class ConfigError(UserError):
    """A setting that does not exist or has a value that it cannot have."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


def _number(value: Any) -> Any:
    # YAML 1.1 reads `1e-4` (no dot) as a string; in a field that is a number it is one, and `1e3` a whole one.
    if not isinstance(value, str) or not re.fullmatch(r"[+-]?[\d.]+[eE][+-]?\d+", value):
        return value
    number = float(value)
    return int(number) if number.is_integer() else number


Number = Annotated[float, BeforeValidator(_number)]
Whole = Annotated[int, BeforeValidator(_number)]


def _numbers(value: Any) -> Any:
    """Number by number in the options of a part, lists and sections in it included."""
    if isinstance(value, dict):
        return {k: v if k in ("type", "name", "text") else _numbers(v) for k, v in value.items()}
    return [_numbers(v) for v in value] if isinstance(value, list) else _number(value)


PartSpec = Annotated[dict[str, Any], BeforeValidator(_numbers)]  # {"type": name, **options}


class LoraConfig(_Section):
    """A named set of low-rank adapters on the LLM (arXiv 2106.09685), through PEFT."""

    name: str = Field("default", pattern=r"^[A-Za-z]\w*$", description="parameters are called lora_A.<name>.weight")
    copy_of: str | None = Field(None, description="set to begin as a copy of, and to replace among the active ones")
    active: bool = Field(True, description="takes part unless the code activates other sets")
    r: Whole = Field(16, gt=0)
    alpha: Number = 32
    dropout: Number = Field(0.0, ge=0, lt=1)
    targets: str | list[str] = "all-linear"

    @model_validator(mode="after")
    def _a_copy_has_the_size_of_its_source(self) -> LoraConfig:
        fields = type(self).model_fields
        given = [name for name in ("r", "alpha", "targets") if getattr(self, name) != fields[name].default]
        if self.copy_of is not None and given:
            raise ValueError(
                f"{', '.join(given)} given beside copy_of; a copy has those of {self.copy_of!r}. Leave them out"
            )
        return self


class LLMConfig(_Section):
    """The language model: any ``AutoModelForCausalLM``."""

    name: str = Field(description="hub name or folder")
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantize: Literal["4bit", "8bit"] | None = None
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"


class SamplingConfig(_Section):
    """Which frames of a video are looked at: ``num_frames`` spread evenly, or ``fps`` with a cap."""

    num_frames: Whole | None = Field(None, gt=0)
    fps: Number | None = Field(None, gt=0)
    max_frames: Whole | None = Field(None, gt=0)
    short_side: Whole | None = Field(None, gt=0, description="pixels that larger pictures are shrunk to while decoding")

    @model_validator(mode="after")
    def _one_way(self) -> SamplingConfig:
        if (self.num_frames is None) == (self.fps is None):
            raise ValueError(f"num_frames is {self.num_frames} and fps is {self.fps}; give exactly one of the two")
        return self


def _encoders(value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    for stream, spec in value.items():
        check_stream(stream, spec)
    return value


Encoders = Annotated[dict[str, PartSpec], Field(min_length=1), AfterValidator(_encoders)]
"""By stream; one that is not called ``video`` or ``audio`` says its ``medium``."""


class ModelConfig(_Section):
    """What the model is made of."""

    llm: LLMConfig
    encoders: Encoders
    connector: list[PartSpec] = Field(min_length=1)
    layout: PartSpec = Field(default_factory=lambda: {"type": "concat"})
    time_codec: PartSpec = Field(default_factory=lambda: {"type": "seconds"})
    fusion: PartSpec | None = Field(None, description="lets streams act inside the LLM, beside its sequence")
    sampling: SamplingConfig = Field(default_factory=lambda: SamplingConfig.model_validate({"num_frames": 8}))
    selector: PartSpec | None = Field(None, description="chooses frames by the question, before they are encoded")
    system: str | None = Field(None, description="system prompt put before chats that bring none")
    media_text: dict[Literal["video", "audio", "image"], str] = Field(
        default_factory=dict, description="text around the tokens of a media part, for example '<Video>{media}</Video>'"
    )


def _curriculum(value: dict[int, float]) -> dict[int, float]:
    if min(value, default=1) != 0:
        raise ValueError(f"weights from steps {sorted(value)}; expected the first to hold from step 0")
    return value


Weight = Annotated[
    Annotated[Number, Field(gt=0), Tag("number")]
    | Annotated[dict[int, Annotated[Number, Field(ge=0)]], AfterValidator(_curriculum), Tag("by_step")],
    Discriminator(lambda value: "by_step" if isinstance(value, dict) else "number"),
]
"""Of a source: a number, or numbers by the step from which each holds."""


class SourceConfig(_Section):
    """One manifest of a mixture."""

    manifest: str = Field(description="JSONL file, or an fsspec URL of one (s3://...); shards have one beside them")
    weight: Weight = Field(1.0, description="times a row is drawn an epoch; {0: 1, 500: 0.2} changes it at step 500")
    max_rows: Whole | None = Field(None, gt=0, description="a larger source counts as one of so many rows")

    @property
    def steps(self) -> list[int]:
        """The steps from which a weight holds."""
        return sorted(self.weight) if isinstance(self.weight, dict) else [0]

    def weight_at(self, step: int) -> float:
        """The weight that holds at a step."""
        by_step = self.weight if isinstance(self.weight, dict) else {0: self.weight}
        return by_step[max(begin for begin in by_step if begin <= step)]


def _list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def _sources(value: Any) -> Any:
    return [{"manifest": v} if isinstance(v, str) else v for v in _list(value)]


Sources = Annotated[list[SourceConfig], BeforeValidator(_sources)]


class AugmentConfig(_Section):
    """Changes to the sound of training clips, drawn anew each time; see :mod:`avllm.data.augment`."""

    roll: bool = Field(False, description="begin at any moment; what stood before it follows the end")
    speed: Number = Field(0.0, ge=0, le=1, description="octaves up to which a clip is played faster or slower")
    gain: Number = Field(0.0, ge=0, description="decibels up to which a clip gets louder or softer")
    background: Number = Field(0.0, ge=0, le=1, description="share of clips behind which another row's clip is heard")
    background_db: tuple[Number, Number] = Field((5.0, 20.0), description="how much softer it is, least and most")
    bands: Whole = Field(0, ge=0, description="frequency bands that are softened by 30 dB")
    band_share: Number = Field(0.15, gt=0, le=1, description="widest such band, as a share of the mel scale")
    silences: Whole = Field(0, ge=0, description="stretches that fall silent")
    silence_seconds: Number = Field(0.5, gt=0, description="longest such stretch")


def _named_apart(sets: list[LoraConfig]) -> list[LoraConfig]:
    names = [one.name for one in sets]
    if len(set(names)) < len(names):
        raise ValueError(f"sets are named {names}; expected a name each")
    return sets


LoraSets = Annotated[
    list[LoraConfig],
    BeforeValidator(lambda value: [] if value is None else _list(value)),
    AfterValidator(_named_apart),
]
"""One set of LoRA adapters, a list of them, or none."""


class DataConfig(_Section):
    """What is read and how."""

    train: Sources
    validation: Sources = Field(default_factory=list)
    rows: PartSpec = Field(
        default_factory=lambda: {"type": "whole"}, description="row maker: how a sample becomes rows"
    )
    max_length: Whole = Field(2048, gt=0, description="longest sequence; a row whose answer would be cut is a bad row")
    pack: bool | Literal["media", "sequences", "both"] = Field(
        False, description="rows that share a sequence, blind to each other: about the same media (true), any, or both"
    )
    max_packed: Whole = Field(32, gt=0, description="most rows about the same media behind one copy of it")
    pack_length: Whole | None = Field(None, gt=0, description="longest sequence that any rows fill; max_length")
    temperature: Number = Field(1.0, gt=0, description="above 1, sources' sizes come closer: size ** (1 / temperature)")
    batches: Literal["mixed", "one_source"] = Field("mixed", description="one_source: each micro batch is of one")
    quarantine: Annotated[list[str], BeforeValidator(_list)] = Field(
        default_factory=list, description="files of `avllm data check` (id, tab, reason): rows that are left out"
    )
    num_workers: Whole = Field(2, ge=0)
    max_skip_rate: Number = Field(0.01, ge=0, le=1, description="share of bad rows above which the run stops")
    cache: str | None = Field(None, description="folder in which features of frozen encoders are kept")
    cache_dtype: Literal["float32", "float16", "bfloat16"] | None = Field(None, description="of kept features; as made")
    cache_max_gb: Number | None = Field(
        None,
        gt=0,
        description="GB that the folder may hold; what was used longest ago leaves, what this run needs never",
    )
    timeout: Number = Field(60.0, gt=0, description="seconds after which decoding a file is given up")
    keep_decoded: Number = Field(0.0, ge=0, description="MB of decoded clips that a loader process keeps")
    augment: AugmentConfig | None = Field(None, description="changes to training clips; not with data.cache")

    @model_validator(mode="after")
    def _something_is_drawn(self) -> DataConfig:
        for step in sorted({step for source in self.train for step in source.steps}):
            if not any(source.weight_at(step) for source in self.train):
                raise ValueError(f"at step {step} the weight of every source is 0; give one of them a weight there")
        return self

    @model_validator(mode="after")
    def _no_cached_changes(self) -> DataConfig:
        if self.augment is not None and self.cache is not None:
            raise ValueError("both augment and cache are given; cached features cannot be changed. Leave one out")
        return self

    @property
    def shares_media(self) -> bool:
        """Whether rows about the same media stand behind one copy of it."""
        return self.pack in (True, "media", "both")

    @property
    def filled_length(self) -> int | None:
        """Longest sequence that any rows fill together; None where they do not."""
        return (self.pack_length or self.max_length) if self.pack in ("sequences", "both") else None

    @model_validator(mode="after")
    def _sequences_hold_rows(self) -> DataConfig:
        if self.pack_length is not None and self.filled_length is None:
            raise ValueError(f"pack_length is given with pack {self.pack!r}; it belongs to pack: sequences or both")
        if self.pack_length is not None and self.pack_length < self.max_length:
            raise ValueError(
                f"pack_length {self.pack_length} is below max_length {self.max_length}, up to which a row may be long; "
                "raise the one or lower the other"
            )
        return self


class TrainConfig(_Section):
    """How long and how fast."""

    max_steps: Whole | None = Field(None, gt=0)
    epochs: Number | None = Field(None, gt=0)
    batch_size: Whole = Field(8, gt=0, description="rows in a micro-step of one process")
    max_tokens: Whole | None = Field(None, gt=0, description="a micro-step's, padding included: rows make several")
    accumulate: Whole = Field(1, gt=0, description="micro-steps in an optimizer step")
    warmup: Number = Field(0.03, ge=0, description="steps, or a share of all steps when below 1")
    schedule: Literal["cosine", "constant"] = "cosine"
    min_lr_ratio: Number = Field(0.0, ge=0, le=1)
    clip: Number | None = Field(1.0, gt=0, description="largest gradient norm")
    weight_decay: Number = Field(0.0, ge=0)
    betas: tuple[Number, Number] = (0.9, 0.98)
    optimizer: Literal["adamw", "muon"] = Field("adamw", description="muon: for weight matrices; AdamW for the rest")
    precision: Literal["auto", "fp32", "bf16"] = Field("fp32", description="auto: bf16 where the hardware has it")
    gradient_checkpointing: bool = False
    validate_every: Whole | None = Field(None, gt=0)
    validate_rows: Whole | None = Field(None, gt=0, description="most validation rows looked at each time")
    save_every: Whole | None = Field(500, gt=0, description="steps between resume points; null for the end only")
    keep: Whole = Field(2, gt=0, description="how many resume points stay on disk")
    log_every: Whole = Field(10, gt=0)
    trackers: list[str] = Field(default_factory=lambda: ["tensorboard"])

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if (self.max_steps is None) == (self.epochs is None):
            raise ValueError(f"max_steps is {self.max_steps} and epochs is {self.epochs}; give exactly one of the two")
        return self


def _regex(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"no regular expression: {error}") from error
    return value


Rule = tuple[Annotated[str, AfterValidator(_regex)], Number | None]
Stage = Literal["align", "caption", "instruct", "prefer"]


class ExtendConfig(_Section):
    """What a stage adds to the model that it starts from; what is there keeps its weights."""

    encoders: Annotated[dict[str, PartSpec], AfterValidator(_encoders)] = Field(default_factory=dict)
    connector: list[PartSpec] = Field(
        min_length=1, description="adapters; behind those of the model, or each at its `place` in the longer list"
    )
    layout: PartSpec | None = Field(None, description="instead of the model's")


class RunConfig(_Section):
    """One stage of training, as a preset file holds it."""

    stage: Stage
    output: str = Field(description="the run's folder")
    model: ModelConfig | None = Field(None, description="stage 1 (or init_from_scratch) only; later stages take init's")
    init: str | None = Field(None, description="run folder of the stage before")
    extend: ExtendConfig | None = Field(None, description="streams and adapters that init's model grows by")
    init_from_scratch: bool = False
    allow_parts: list[str] = Field([], description="code that init may name and run, pkg.module:Class each")
    lora: LoraSets = Field(default_factory=list, description="sets of adapters that this stage adds to the LLM")
    trainable: list[Rule] = Field(min_length=1, description="[regex, learning rate or null]; the first match wins")
    objectives: list[PartSpec] = Field(min_length=1)
    data: DataConfig
    train: TrainConfig
    seed: Whole = 0

    @model_validator(mode="after")
    def _one_start(self) -> RunConfig:
        if self.model is None and self.init is None:
            raise ValueError("neither model nor init is given; stage 1 describes a model, later stages say init: RUN")
        if self.model is not None and self.init is not None:
            raise ValueError("both model and init are given; the model is described in stage 1 only")
        if self.extend is not None and self.init is None:
            raise ValueError("extend is given without init; it adds to a trained model. Say init: RUN")
        return self

    @model_validator(mode="after")
    def _writes_here(self) -> RunConfig:
        for folder in filter(None, (self.output, self.data.cache)):
            if re.match(r"[a-z][a-z0-9+.-]+:/", folder):
                raise ValueError(f"{folder} is a URL; expected folders of this machine for output and data.cache")
        return self

    @model_validator(mode="after")
    def _lengths_are_known(self) -> RunConfig:
        if self.train.epochs is not None and any(source.steps != [0] for source in self.data.train):
            raise ValueError("weights that change with the steps go with train.max_steps; train.epochs is given")
        longest = self.data.filled_length or self.data.max_length
        if self.train.max_tokens is not None and self.train.max_tokens < longest:
            raise ValueError(
                f"train.max_tokens {self.train.max_tokens} is below data.max_length (or pack_length) {longest}, up to "
                "which a row may be long; raise the one or lower the other"
            )
        return self


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a preset and apply ``section.key=value`` overrides (values are YAML).

    Raises:
        ConfigError: the file is missing, no YAML, or a key or a value is wrong; the message names the right key.
    """
    data = read_mapping(Path(path), "a preset", ConfigError)
    for override in overrides or []:
        apply_override(data, override, ConfigError)
    composed = [o for o in overrides or [] if o.startswith("model.")]
    if composed and data.get("init") is not None:
        raise ConfigError(
            f"{path}: {composed[0]!r} would be of no use: the model comes from init ({data['init']}). Set it in the "
            "stage that composes the model"
        )
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        given = {override.partition("=")[0] for override in overrides or []}
        raise ConfigError(f"{path}: {explain(error, given, RunConfig)}") from error


def dump_config(config: BaseModel, path: str | Path) -> None:
    """Write resolved settings as YAML."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    Path(path).write_text(text, encoding="utf-8")
