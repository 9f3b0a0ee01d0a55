"""Settings of what a stage adds to the LLM's layers through PEFT: LoRA sets, and other methods."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator

from avllm.config_values import Number, Section, Whole, as_list
from avllm.registry import suggest

METHODS = {"ia3": "IA3Config", "loha": "LoHaConfig", "lokr": "LoKrConfig", "vera": "VeraConfig"}
"""PEFT's class of each method beside LoRA."""
PEFT_NAMES = {"target_modules": "targets", "lora_alpha": "alpha", "lora_dropout": "dropout"}
"""PEFT's names of settings that are called otherwise here; both are understood."""

_OWN_WEIGHTS = "it changes the LLM's own weights, which a checkpoint does not hold"
_NEEDS_IDS = "it needs the token ids of the prompt, and the LLM is given embeddings"
_OTHER_MODEL = "it changes the LLM's layers, and a checkpoint holds those of its backbone"
_OUTSIDE = "the run itself sets it"
_UNTRIED = "its weights would not be saved and loaded strictly"
REFUSED_OPTIONS = {
    "modules_to_save": f"{_OTHER_MODEL}; train parameters of the LLM by a rule of `trainable`",
    "trainable_token_indices": "train added words instead (AVLLM.add_words)",
    "bias": f"{_OWN_WEIGHTS}; train biases by a rule of `trainable`",
    "layer_replication": _OTHER_MODEL,
    "alora_invocation_tokens": _NEEDS_IDS,
    "lora_bias": "a layer without a bias, as most LLMs have, could not take it when it is merged",
    "loftq_config": _OWN_WEIGHTS,
    "eva_config": "it needs a pass over the data before training",
    "corda_config": _OWN_WEIGHTS,
    "lora_ga_config": _OWN_WEIGHTS,
    "rank_dropout": "it acts in frozen sets too",
    "module_dropout": "it acts in frozen sets too",
    "rank_dropout_scale": "rank_dropout is not supported",
    "task_type": _OUTSIDE,
    "peft_type": _OUTSIDE,
    "inference_mode": _OUTSIDE,
    "auto_mapping": _OUTSIDE,
    "peft_version": _OUTSIDE,
    "base_model_name_or_path": _OUTSIDE,
    "revision": _OUTSIDE,
    "runtime_config": _OUTSIDE,
    "fan_in_fan_out": "PEFT sets it by the kind of the layer",
    **dict.fromkeys(
        [
            "arrow_config",
            "ensure_weight_tying",
            "kasa_config",
            "megatron_config",
            "megatron_core",
            "monteclora_config",
            "qalora_group_size",
            "target_parameters",
            "use_bdlora",
            "use_qalora",
            "velora_config",
        ],
        _UNTRIED,
    ),
}
"""Options of PEFT that no set may have, with the reason."""
_VIRTUAL = "it adds virtual tokens to the sequence, whose masks and places follow from the media"
REFUSED_METHODS = {
    "lora": "it has its own key, lora: {r: 16, ...}",
    "prefix_tuning": _VIRTUAL,
    "prompt_tuning": _VIRTUAL,
    "p_tuning": _VIRTUAL,
    "multitask_prompt_tuning": _VIRTUAL,
    "cpt": _VIRTUAL,
    "cartridge": _VIRTUAL,
    "adaption_prompt": _VIRTUAL,
    "adalora": "its ranks follow a schedule that the trainer does not know",
    "xlora": _NEEDS_IDS,
    "poly": _NEEDS_IDS,
    "ln_tuning": f"{_OWN_WEIGHTS}; train norms by a rule of `trainable`",
    "trainable_tokens": "train added words instead (AVLLM.add_words)",
}
"""Methods of PEFT that are not supported, with the reason."""


def _admitted(value: Any) -> Any:
    """Refuse options of PEFT that would be lost or have no effect; use the names of this package.

    Raises:
        ValueError: names the option and the reason.
    """
    if not isinstance(value, dict):
        return value
    settings = {}
    for key, content in value.items():
        if key in REFUSED_OPTIONS:
            raise ValueError(f"{key} of PEFT is not supported: {REFUSED_OPTIONS[key]}")
        name = PEFT_NAMES.get(key, key)
        if name in settings:
            raise ValueError(f"{key} and {name} are the same setting; give one of them")
        settings[name] = content
    return settings


class AdapterSet(Section):
    """Hold what sets of all methods have."""

    name: str = Field(
        "default",
        pattern=r"^[A-Za-z]\w*$",
        description="parameters are called lora_A.<name>.weight",
    )
    copy_of: str | None = Field(
        None,
        description="set to begin as a copy of, and to replace among the active ones",
    )
    active: bool = Field(True, description="takes part unless the code activates other sets")
    targets: str | list[str] = Field(
        "all-linear",
        description="linear layers of the LLM by the end of their names, or all-linear",
    )

    @model_validator(mode="before")
    @classmethod
    def _goes_with_checkpoints(cls, value: Any) -> Any:
        return _admitted(value)

    @model_validator(mode="after")
    def _has_the_size_of_its_source(self) -> AdapterSet:
        free = {"name", "copy_of", "active", "type", "dropout"}
        given = sorted(self.model_dump(exclude_defaults=True).keys() - free)
        if self.copy_of is not None and given:
            raise ValueError(
                f"{', '.join(given)} given beside copy_of; a copy has those of {self.copy_of!r}. "
                "Leave them out"
            )
        return self


class LoraConfig(AdapterSet):
    """A named set of low-rank adapters on the LLM (arXiv 2106.09685), through PEFT."""

    r: Whole = Field(16, gt=0, description="rank")
    alpha: Number = Field(32, description="the update is scaled by alpha / r")
    dropout: Number = Field(0.0, ge=0, lt=1, description="share of inputs set to 0 in training")
    exclude_modules: str | list[str] | None = Field(
        None, description="layers that are left out: ends of names, or one regex"
    )
    layers_to_transform: Whole | list[Whole] | None = Field(
        None, description="numbers of the LLM's layers that get adapters; null for all"
    )
    layers_pattern: str | list[str] | None = Field(
        None, description="name of the list of layers, where PEFT does not know it"
    )
    rank_pattern: dict[str, Whole] = Field(
        default_factory=dict, description="other ranks, by name or regex of a layer"
    )
    alpha_pattern: dict[str, Number] = Field(
        default_factory=dict, description="other alphas, by name or regex of a layer"
    )
    use_rslora: bool = Field(False, description="scale by alpha / sqrt(r) (arXiv 2312.03732)")
    use_dora: bool = Field(
        False, description="train the length of weights apart (DoRA, arXiv 2402.09353)"
    )
    init_lora_weights: bool | Literal["gaussian", "orthogonal"] = Field(
        True,
        description="first weights; false: random, so that the LLM answers otherwise at once",
    )


class PeftConfig(AdapterSet):
    """A named set of another method of PEFT; further keys are options of PEFT's class of it.

    ``ia3`` (arXiv 2205.05638), ``loha`` (2108.06098), ``lokr`` (2309.14859), ``vera`` (2310.11454).
    Without ``targets``, ``ia3`` takes the layers of PEFT's table: keys, values, feed-forward.
    """

    model_config = ConfigDict(extra="allow")

    type: Literal["ia3", "loha", "lokr", "vera"] = Field(description="the method")

    @model_validator(mode="before")
    @classmethod
    def _is_supported(cls, value: Any) -> Any:
        name = value.get("type") if isinstance(value, dict) else None
        if isinstance(name, str) and name not in METHODS:
            known = suggest(name, list(METHODS))
            reason = REFUSED_METHODS.get(name.lower())
            if reason is not None:
                raise ValueError(f"type {name} is not supported: {reason}")
            raise ValueError(f"type {name} is not supported; {known}")
        return value


def _sets_of(value: Any) -> Any:
    return [] if value is None else as_list(value)


def named_apart(sets: list[Any]) -> list[Any]:
    """Return the sets.

    Raises:
        ValueError: two have one name.
    """
    names = [one.name for one in sets]
    if len(set(names)) < len(names):
        raise ValueError(f"sets are named {names}; expected a name each")
    return sets


LoraSets = Annotated[list[LoraConfig], BeforeValidator(_sets_of), AfterValidator(named_apart)]
"""One set of LoRA adapters, a list of them, or none."""
PeftSets = Annotated[list[PeftConfig], BeforeValidator(_sets_of), AfterValidator(named_apart)]
"""One set of another method, a list of them, or none."""
