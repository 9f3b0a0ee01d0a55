"""Settings of a run, typed: a YAML file and ``key=value`` overrides; errors name the right key.

The options of a part (encoder, adapter, layout, objective) are that part's keyword arguments: they
are checked against its constructor and listed nowhere else.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import AfterValidator, BaseModel, Field, ValidationError, model_validator

from avllm.config_data import DataConfig
from avllm.config_errors import ConfigError, PresetPlaces, explain
from avllm.config_model import ExtendConfig, ModelConfig
from avllm.config_peft import LoraConfig, LoraSets, PeftConfig, PeftSets
from avllm.config_values import Number, ObjectiveSpec, Section, Whole
from avllm.yaml_files import apply_override, read_mapping

URL = re.compile(r"[a-z][a-z0-9+.-]+:/")


class TrainConfig(Section):
    """Length, speed and figures of a stage's training."""

    max_steps: Whole | None = Field(None, gt=0, description="optimizer steps; or give epochs")
    epochs: Number | None = Field(None, gt=0, description="passes over the mixture")
    batch_size: Whole = Field(8, gt=0, description="rows in a micro-step of one process")
    max_tokens: Whole | None = Field(
        None,
        gt=0,
        description="most tokens of a micro-step, padding included; more rows make several",
    )
    accumulate: Whole = Field(1, gt=0, description="micro-steps in an optimizer step")
    warmup: Number = Field(0.03, ge=0, description="steps, or a share of all steps when below 1")
    schedule: Literal["cosine", "constant"] = Field(
        "cosine", description="course of the learning rate after the warm-up"
    )
    min_lr_ratio: Number = Field(
        0.0, ge=0, le=1, description="learning rate at the end of cosine, as a share of the highest"
    )
    clip: Number | None = Field(1.0, gt=0, description="largest gradient norm; null for no limit")
    weight_decay: Number = Field(0.0, ge=0, description="decoupled weight decay")
    betas: tuple[Number, Number] = Field((0.9, 0.98), description="AdamW's decay rates")
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: for weight matrices; AdamW for the rest"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "fp32", description="auto: bf16 where the hardware has it"
    )
    gradient_checkpointing: bool = Field(
        False, description="compute activations again in the backward pass: slower, less memory"
    )
    validate_every: Whole | None = Field(
        None, gt=0, description="steps between validations; null for the end only"
    )
    validate_rows: Whole | None = Field(
        None, gt=0, description="most validation rows read each time, drawn by seed"
    )
    best_by: str = Field(
        "loss",
        description="figure of validation that chooses best/: loss, an objective (its loss) or "
        "OBJECTIVE/FIGURE, as next_token/answers; a wrong name lists the stage's",
    )
    save_every: Whole | None = Field(
        500, gt=0, description="steps between resume points; null for the end only"
    )
    keep: Whole = Field(2, gt=0, description="how many resume points stay on disk")
    log_every: Whole = Field(10, gt=0, description="steps between figures")
    trackers: list[str] = Field(
        default_factory=lambda: ["tensorboard"],
        description="programs that record the figures: tensorboard, wandb, mlflow, ...",
    )

    @model_validator(mode="after")
    def _has_one_length(self) -> TrainConfig:
        if (self.max_steps is None) == (self.epochs is None):
            raise ValueError(
                f"max_steps is {self.max_steps} and epochs is {self.epochs}; "
                "give exactly one of the two"
            )
        return self


def _regex(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"no regular expression: {error}") from error
    return pattern


Rule = tuple[Annotated[str, AfterValidator(_regex)], Number | None]
Stage = Literal["align", "caption", "instruct", "prefer"]


class RunConfig(Section):
    """One stage of training, as a preset file holds it."""

    stage: Stage = Field(description="name of the stage, which its script in train/ expects")
    output: str = Field(description="the run's folder")
    model: ModelConfig | None = Field(
        None, description="stage 1 (or init_from_scratch) only; later stages take init's"
    )
    init: str | None = Field(None, description="run folder of the stage before")
    extend: ExtendConfig | None = Field(
        None, description="streams and adapters that init's model grows by"
    )
    init_from_scratch: bool = Field(
        False, description="begin a later stage without the stages before it"
    )
    allow_parts: list[str] = Field(
        default_factory=list, description="code that init may name and run, pkg.module:Class each"
    )
    backbones: dict[str, str] = Field(
        default_factory=dict, description="folders of init's backbones, {llm: DIR, audio: DIR}"
    )
    lora: LoraSets = Field(
        default_factory=list, description="sets of LoRA that this stage adds to the LLM"
    )
    peft: PeftSets = Field(
        default_factory=list,
        description="sets of another method of PEFT, instead of lora, with its options",
    )
    trainable: list[Rule] = Field(
        min_length=1, description="[regex, learning rate or null]; the first match wins"
    )
    objectives: list[ObjectiveSpec] = Field(
        min_length=1, description="losses that are added up, each with its weight"
    )
    data: DataConfig = Field(description="rows, and the way in which they are read")
    train: TrainConfig = Field(description="length, speed and figures of the training")
    seed: Whole = Field(0, description="of new weights, the order of the rows and all draws")

    @property
    def sets(self) -> list[LoraConfig | PeftConfig]:
        """The sets of adapters that the stage adds to the LLM."""
        return [*self.lora, *self.peft]

    @model_validator(mode="after")
    def _adds_one_method(self) -> RunConfig:
        methods = sorted({one.type for one in self.peft} | {"lora" for _ in self.lora})
        if len(methods) > 1:
            raise ValueError(
                f"lora and peft add {' and '.join(methods)}; PEFT puts one method on an LLM"
            )
        return self

    @model_validator(mode="after")
    def _begins_at_one_model(self) -> RunConfig:
        if self.model is None and self.init is None:
            raise ValueError(
                "neither model nor init is given; stage 1 describes a model, later stages say "
                "init: RUN"
            )
        if self.model is not None and self.init is not None:
            raise ValueError(
                "both model and init are given; the model is described in stage 1 only"
            )
        if self.extend is not None and self.init is None:
            raise ValueError(
                "extend is given without init; it adds to a trained model. Say init: RUN"
            )
        return self

    @model_validator(mode="after")
    def _writes_to_this_machine(self) -> RunConfig:
        for folder in (self.output, self.data.cache):
            if folder is not None and URL.match(folder):
                raise ValueError(
                    f"{folder} is a URL; expected folders of this machine for output and data.cache"
                )
        return self

    @model_validator(mode="after")
    def _fits_its_lengths(self) -> RunConfig:
        changing = [source for source in self.data.train if source.steps != [0]]
        if self.train.epochs is not None and changing:
            raise ValueError(
                "weights that change with the steps go with train.max_steps; train.epochs is given"
            )
        longest = self.data.filled_length or self.data.max_length
        if self.train.max_tokens is not None and self.train.max_tokens < longest:
            raise ValueError(
                f"train.max_tokens {self.train.max_tokens} is below data.max_length (or "
                f"pack_length) {longest}, up to which a row may be long; raise the one or lower "
                "the other"
            )
        return self


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a preset and apply ``section.key=value`` overrides (values are YAML).

    Keys, types of values and the names of parts are checked, which costs no heavy import. The
    options of parts, the rules of ``trainable``, manifests and ``init`` are checked when the stage
    starts, before a model is loaded (:func:`avllm.training.start.check_settings`). Relative paths
    in a preset are relative to the folder in which the command runs.

    Raises:
        ConfigError: the file is missing, no YAML, or a key or a value is wrong; the message names
            file and line, and the right key.
    """
    overrides = overrides or []
    settings = read_mapping(Path(path), "a preset", ConfigError)
    for override in overrides:
        apply_override(settings, override, ConfigError)
    for override in overrides:
        if override.startswith("model.") and settings.get("init") is not None:
            raise ConfigError(
                f"{path}: {override!r} would be of no use: the model comes from init "
                f"({settings['init']}). Set it in the stage that composes the model"
            )
    try:
        return RunConfig.model_validate(settings)
    except ValidationError as error:
        places = PresetPlaces(path, overrides)
        raise ConfigError(explain(error, places, RunConfig)) from error


def dump_config(config: BaseModel, path: str | Path) -> None:
    """Write all settings as YAML, defaults included."""
    settings = config.model_dump(mode="json")
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    Path(path).write_text(text, encoding="utf-8")
