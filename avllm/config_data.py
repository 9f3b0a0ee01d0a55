"""Settings of the data: manifests with their weights, packing, loading, cache, augmentation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from avllm.config_values import Number, RowMakerSpec, Section, Whole, as_list


def _begins_at_zero(weights: dict[int, float]) -> dict[int, float]:
    if min(weights, default=1) != 0:
        raise ValueError(f"weights from steps {sorted(weights)}; expected the first at step 0")
    return weights


def _form_of_weight(value: Any) -> str:
    return "by_step" if isinstance(value, dict) else "number"


_Positive = Annotated[Number, Field(gt=0)]
_ByStep = Annotated[
    dict[int, Annotated[Number, Field(ge=0)]],
    AfterValidator(_begins_at_zero),
]
Weight = Annotated[
    Annotated[_Positive, Tag("number")] | Annotated[_ByStep, Tag("by_step")],
    Discriminator(_form_of_weight),
]
"""Of a source: a number, or numbers by the step from which each holds."""


class SourceConfig(Section):
    """One manifest of a mixture."""

    manifest: str = Field(
        description="JSONL file, or an fsspec URL of one (s3://...); shards have one beside them"
    )
    weight: Weight = Field(
        1.0, description="times a row is drawn an epoch; {0: 1, 500: 0.2} changes it at step 500"
    )
    max_rows: Whole | None = Field(None, gt=0, description="cap on the source's size, in rows")

    @property
    def steps(self) -> list[int]:
        """The steps from which a weight holds."""
        if not isinstance(self.weight, dict):
            return [0]
        return sorted(self.weight)

    def weight_at(self, step: int) -> float:
        """Return the weight that holds at a step."""
        if not isinstance(self.weight, dict):
            return self.weight
        last_change = max(begin for begin in self.weight if begin <= step)
        return self.weight[last_change]


def _with_key(source: Any) -> Any:
    if isinstance(source, str):
        return {"manifest": source}
    return source


def _manifests(value: Any) -> Any:
    return [_with_key(source) for source in as_list(value)]


Sources = Annotated[list[SourceConfig], BeforeValidator(_manifests)]
"""A manifest, a source, or a list of both."""


class AugmentConfig(Section):
    """Random changes to the sound of training clips; see :mod:`avllm.data.augment`."""

    roll: bool = Field(
        False, description="begin at any moment; the sound before it follows after the end"
    )
    speed: Number = Field(
        0.0, ge=0, le=1, description="octaves up to which a clip is played faster or slower"
    )
    gain: Number = Field(0.0, ge=0, description="decibels up to which a clip gets louder or softer")
    background: Number = Field(
        0.0, ge=0, le=1, description="share of clips that get another row's clip as background"
    )
    background_db: tuple[Number, Number] = Field(
        (5.0, 20.0), description="decibels by which the background is softer, least and most"
    )
    bands: Whole = Field(0, ge=0, description="frequency bands that are softened by 30 dB")
    band_share: Number = Field(
        0.15, gt=0, le=1, description="widest such band, as a share of the mel scale"
    )
    silences: Whole = Field(0, ge=0, description="stretches that fall silent")
    silence_seconds: Number = Field(0.5, gt=0, description="longest such stretch")


class DataConfig(Section):
    """The rows of a stage, and the way in which they are read."""

    train: Sources = Field(description="manifests to train on, with their weights")
    validation: Sources = Field(default_factory=list, description="manifests to validate on")
    rows: RowMakerSpec = Field(
        default_factory=lambda: {"type": "whole"},
        description="row maker: decides which rows a sample becomes",
    )
    max_length: Whole = Field(
        2048, gt=0, description="longest sequence; a row whose answer would be cut is a bad row"
    )
    pack: bool | Literal["media", "sequences", "both"] = Field(
        False,
        description="rows that share a sequence, blind to each other: about the same media (true), "
        "any (sequences), or both",
    )
    max_packed: Whole = Field(32, gt=0, description="most rows that share one copy of their media")
    pack_length: Whole | None = Field(
        None, gt=0, description="longest sequence that any rows fill; max_length"
    )
    temperature: Number = Field(
        1.0, gt=0, description="above 1, sources' sizes come closer: size ** (1 / temperature)"
    )
    batches: Literal["mixed", "one_source"] = Field(
        "mixed", description="one_source: the rows of a micro batch come from one source"
    )
    quarantine: Annotated[list[str], BeforeValidator(as_list)] = Field(
        default_factory=list,
        description="files of `avllm data check` (id, tab, reason): rows that are left out",
    )
    num_workers: Whole = Field(2, ge=0, description="processes that decode; 0: the trainer itself")
    max_skip_rate: Number = Field(
        0.01, ge=0, le=1, description="share of bad rows above which the run stops"
    )
    cache: str | None = Field(
        None, description="folder in which features of frozen encoders are kept"
    )
    cache_dtype: Literal["float32", "float16", "bfloat16"] | None = Field(
        None, description="of kept features; the encoder's"
    )
    cache_max_gb: Number | None = Field(
        None,
        gt=0,
        description="GB that the folder may hold; features that were not used for longest leave "
        "first, those of this run never",
    )
    accept_changes: bool = Field(
        False,
        description="go on from a resume point although manifests or media have changed since",
    )
    timeout: Number = Field(
        60.0, gt=0, description="seconds after which decoding a file is given up"
    )
    keep_decoded: Number = Field(
        0.0, ge=0, description="MB of decoded clips that a loader process keeps"
    )
    augment: AugmentConfig | None = Field(
        None, description="random changes to training clips; not with data.cache"
    )

    @property
    def shares_media(self) -> bool:
        """True where rows about the same media share one copy of it."""
        return self.pack in (True, "media", "both")

    @property
    def filled_length(self) -> int | None:
        """Longest sequence that any rows fill together; None where they do not."""
        if self.pack not in ("sequences", "both"):
            return None
        return self.pack_length or self.max_length

    @model_validator(mode="after")
    def _draws_from_a_source(self) -> DataConfig:
        steps: set[int] = set()
        for source in self.train:
            steps.update(source.steps)
        for step in sorted(steps):
            if not any(source.weight_at(step) for source in self.train):
                raise ValueError(
                    f"at step {step} the weight of every source is 0; "
                    "give one of them a weight there"
                )
        return self

    @model_validator(mode="after")
    def _caches_no_changes(self) -> DataConfig:
        if self.augment is not None and self.cache is not None:
            raise ValueError(
                "both augment and cache are given; cached features cannot be changed. Leave one out"
            )
        return self

    @model_validator(mode="after")
    def _packs_whole_rows(self) -> DataConfig:
        if self.pack_length is None:
            return self
        if self.filled_length is None:
            raise ValueError(
                f"pack_length is given with pack {self.pack!r}; "
                "it belongs to pack: sequences or both"
            )
        if self.pack_length < self.max_length:
            raise ValueError(
                f"pack_length {self.pack_length} is below max_length {self.max_length}, up to "
                "which a row may be long; raise the one or lower the other"
            )
        return self
