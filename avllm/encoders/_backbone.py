"""Wrap a transformers model as an encoder, loaded without a missing or left-over weight."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from avllm.encoders.base import Encoder
from avllm.errors import UserError
from avllm.registry import suggest
from avllm.weights import (
    ANY_SIZE,
    check_finite,
    check_model_folder,
    no_larger_than,
    size_of,
    weight_files,
)

logger = logging.getLogger(__name__)
SECTIONS = {
    "video": ("image_processor", "video_processor"),
    "audio": ("feature_extractor",),
}
"""Where a file that holds the settings of several processors has those of a medium."""


class Backbone(Encoder):
    """A transformers model as an encoder.

    Layers are counted as in transformers' ``hidden_states``: 0 is the embedding, i the output of
    block i, negative ones count from the end; -1 is the backbone's last output (its final norm
    applied, where it has one). The **last** listed layer is the main stream and has the name
    ``""``; the others are named by their number in the form in which it was given:
    ``layers=[4, 8, -1]`` gives ``{"4": .., "8": .., "": ..}``, and ``layers=[-2]`` makes the
    penultimate block the main stream, as LLaVA does.

    Args:
        config: the tower's config, a full (dual-tower) config that contains it, or either as a
            dict. No weights are read; they are random.
        layers: layers to give out; None means ``[-1]``.
        preprocessing: the checkpoint's ``preprocessor_config.json`` as a dict; None means the
            family's usual values.

    Raises:
        ValueError: a config of another family, a mistyped config field, or a layer that the
            backbone does not have.
    """

    config_class: ClassVar[type[PretrainedConfig]]
    model_class: ClassVar[type[PreTrainedModel]]
    build_options: ClassVar[dict[str, Any]] = {}  # of the model's constructor, beside the config
    tower: ClassVar[str | None] = None  # the tower's field in a full model's config
    key_mapping: ClassVar[dict[str, str]] = {}  # key pattern -> replacement, beyond transformers'
    other_keys: ClassVar[tuple[str, ...]] = ()  # keys of other towers and heads: not to be loaded
    features: ClassVar[tuple[str, ...]] = ("patch",)  # values of ``feature`` that the family has
    # Settings of ``preprocessing`` that the family reads; a file of a checkpoint has many others.
    preprocessing_keys: ClassVar[tuple[str, ...]] = ()
    feature: str = "patch"
    preprocessing_files: ClassVar[tuple[str, ...]] = (
        "preprocessor_config.json",
        "processor_config.json",
    )

    def __init__(
        self,
        config: PretrainedConfig | dict[str, Any],
        *,
        layers: list[int] | None = None,
        preprocessing: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.backbone_config = self.read_config(config)
        self.preprocessing = preprocessing
        self.backbone = self.build(self.backbone_config)
        self.layers = [-1] if layers is None else list(layers)
        self.layer_names = self._name_layers()

    @property
    def depth(self) -> int:
        """Number of blocks: the last valid layer number."""
        return int(self.backbone_config.num_hidden_layers)

    @property
    def out_dims(self) -> dict[str, int]:
        """Width of each layer given out, by its name; ``out_dim`` is that of the main stream."""
        return dict.fromkeys(self.layer_names, int(self.backbone_config.hidden_size))

    @property
    def out_dim(self) -> int:  # type: ignore[override]
        """D of the main stream."""
        return self.out_dims[""]

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments that, with ``backbone_config``, build this encoder again."""
        return {"layers": list(self.layers), "preprocessing": self.preprocessing}

    @classmethod
    def build(cls, config: PretrainedConfig) -> PreTrainedModel:
        """Build the backbone with random weights."""
        return cls.model_class(config, **cls.build_options)

    @classmethod
    def read_config(cls, config: PretrainedConfig | dict[str, Any]) -> PretrainedConfig:
        """Return a copy of the tower's config, also out of a full model's config.

        Raises:
            ValueError: a config of another family, or a field that the family does not have.
        """
        if isinstance(config, PretrainedConfig):
            config = config.to_dict()
        expected = cls.config_class.model_type
        model_type = config.get("model_type", expected)
        if model_type != expected:
            if cls.tower and isinstance(config.get(cls.tower), dict):
                return cls.read_config(config[cls.tower])
            full = f" or a full model with a {cls.tower}" if cls.tower else ""
            raise ValueError(
                f"{cls.__name__}: the config is of model_type {model_type!r}; "
                f"expected {expected!r}{full}. Choose the encoder of that family"
            )
        config = copy.deepcopy(config)
        if "transformers_version" not in config:
            # Written by hand: transformers would take a mistyped field without a word.
            cls._refuse_unknown_fields(config)
        return cls.config_class.from_dict(config)

    @classmethod
    def _refuse_unknown_fields(cls, config: dict[str, Any]) -> None:
        fields = set(cls.config_class().to_dict()) | {"model_type"}
        unknown = sorted(set(config) - fields)
        if unknown:
            raise ValueError(
                f"{cls.config_class.__name__} has no field {', '.join(unknown)}; "
                f"{suggest(unknown[0], sorted(fields))}"
            )

    @classmethod
    def saved_config(cls, name_or_path: str, revision: str | None = None) -> PretrainedConfig:
        """Return the config of a checkpoint by hub name or folder; no weights are loaded."""
        saved: PretrainedConfig = AutoConfig.from_pretrained(
            name_or_path, revision=revision, trust_remote_code=False
        )
        return saved

    @classmethod
    def check_preprocessing(cls, settings: dict[str, Any]) -> None:
        """Refuse settings of ``preprocessing``, as a person wrote them, that would change nothing.

        Raises:
            UserError: ``unknown_option``; names the nearest setting that the family reads.
        """
        for name in settings:
            if cls.preprocessing_keys and name not in cls.preprocessing_keys:
                raise UserError(
                    f"preprocessing.{name} would change nothing: {cls.__name__} does not read it; "
                    f"{suggest(name, list(cls.preprocessing_keys))}",
                    reason="unknown_option",
                )

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        *,
        layers: list[int] | None = None,
        dtype: torch.dtype | str | None = None,
        revision: str | None = None,
        **options: Any,
    ) -> Self:
        """Load the tower: the encoder part of a full model such as CLIP, or a model by itself.

        The encoder is in eval mode; the model that owns it freezes its weights.

        Args:
            name_or_path: hub name or local folder.
            layers: see the class.
            dtype: dtype of the weights, also as a name ("bfloat16"); None keeps the checkpoint's.
            revision: branch, tag or commit on the hub.
            options: the family's own keyword arguments, and ``preprocessing``: where it is given,
                even as None, the checkpoint's own file is not read. So a saved model is loaded
                with the preprocessing that it was trained with.

        Raises:
            ValueError: weights that are missing, unknown or of another shape, or another family.
            OSError: there is no such checkpoint.
        """
        check_model_folder(name_or_path)
        files = weight_files(name_or_path)
        config = cls.read_config(cls.saved_config(name_or_path, revision))
        if "preprocessing" not in options:
            options["preprocessing"] = cls.read_preprocessing(name_or_path, revision)
        # A hub name has no files here; its config and its weights are of one commit.
        size = size_of(files) if files else ANY_SIZE
        # Without memory, since the loaded backbone replaces this one. It checks layers and options.
        with torch.device("meta"), no_larger_than(size, f"the encoder {name_or_path}"):
            encoder = cls(config, layers=layers, **options)
        with _ignoring_weights(cls.model_class, cls.other_keys):
            loaded: Any = cls.model_class.from_pretrained(
                name_or_path,
                config=encoder.backbone_config,  # `build` may have changed it (wav2vec 2.0)
                dtype="auto" if dtype is None else dtype,
                revision=revision or "main",
                trust_remote_code=False,
                key_mapping=cls.key_mapping or None,
                output_loading_info=True,
                **cls.build_options,
            )
        encoder.backbone, report = loaded  # the report has missing_keys, unexpected_keys, ...
        cls._check_keys(name_or_path, report)
        check_finite(encoder.backbone.named_parameters(), f"the encoder {name_or_path}")
        return encoder.eval()

    @classmethod
    def _check_keys(cls, name: str, report: dict[str, Any]) -> None:
        """Refuse missing, misshapen or unknown weights.

        A half-loaded backbone gives features of random layers, and its run would end without error.
        """
        missing = sorted(report["missing_keys"])
        wrong = sorted(str(key) for key in report["mismatched_keys"])
        unknown = sorted(report["unexpected_keys"])  # ``other_keys`` are no longer in it
        if missing or wrong or unknown:
            raise ValueError(
                f"{name} does not fit {cls.model_class.__name__}: missing {_some(missing)}; "
                f"wrong shape {_some(wrong)}; unexpected {_some(unknown)}. "
                f"Is it of the {cls.__name__} family?"
            )

    @classmethod
    def read_preprocessing(
        cls, name_or_path: str, revision: str | None = None
    ) -> dict[str, Any] | None:
        """Return the checkpoint's own preprocessing; None (logged) without a file of it."""
        for file in cls.preprocessing_files:
            path = cached_file(
                name_or_path,
                file,
                revision=revision,
                _raise_exceptions_for_missing_entries=False,
            )
            if path is None:
                continue
            with open(path, encoding="utf-8") as opened:
                settings: dict[str, Any] = json.load(opened)
            for section in SECTIONS[cls.medium]:
                if section in settings:
                    return dict(settings[section])
            return settings
        logger.warning(
            "%s has no %s; the family's usual preprocessing is used",
            name_or_path,
            cls.preprocessing_files[0],
        )
        return None

    def _name_layers(self) -> list[str]:
        first = -self.depth - 1
        outside = [i for i in self.layers if not first <= i <= self.depth]
        if outside or not self.layers:
            raise ValueError(
                f"{type(self).__name__}: layers {self.layers}; expected at least one, "
                f"each from {first} to {self.depth} "
                f"({self.depth} blocks; 0 is the embedding, -1 the last output)"
            )
        if len({self.from_start(i) for i in self.layers}) < len(self.layers):
            raise ValueError(
                f"{type(self).__name__}: layers {self.layers} name one layer twice; list each once"
            )
        return [*map(str, self.layers[:-1]), ""]

    def from_start(self, layer: int) -> int:
        """Return a layer's number counted from the start: ``depth`` for -1."""
        return layer % (self.depth + 1)

    def check_feature(self) -> None:
        """Refuse a feature that the family lacks, and pooled features of inner layers.

        Raises:
            ValueError: one of these.
        """
        if self.feature not in self.features:
            raise ValueError(
                f"{type(self).__name__}: feature {self.feature!r}; "
                f"expected one of {', '.join(self.features)}"
            )
        numbers = [self.from_start(layer) for layer in self.layers]
        if self.feature == "pooled" and numbers != [self.depth]:
            raise ValueError(
                f"{type(self).__name__}: pooled exists for the last layer only; "
                f"leave out layers={self.layers}"
            )

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Encode units: the backbone's inputs ``(U, ...)`` -> ``{layer: (U, S, P, D)}``."""
        dtype = next(self.backbone.parameters()).dtype
        cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        has_inner = any(self.from_start(layer) != self.depth for layer in self.layers)
        out = self.backbone(**cast, **self.call_options(), output_hidden_states=has_inner)
        by_name = {}
        for name, layer in zip(self.layer_names, self.layers, strict=True):
            is_last = self.from_start(layer) == self.depth
            x = out.last_hidden_state if is_last else out.hidden_states[layer]
            by_name[name] = self.arrange(x, out)
        return by_name

    def call_options(self) -> dict[str, Any]:
        """Return further arguments of the backbone's forward."""
        return {}

    def arrange(self, x: Tensor, out: Any) -> Tensor:
        """Bring one layer's output into the form ``(U, S, P, D)``.

        Args:
            x: the layer as the backbone gives it. out: the backbone's whole output.
        """
        raise NotImplementedError(f"{type(self).__name__}.arrange")


@contextmanager
def _ignoring_weights(
    model_class: type[PreTrainedModel], patterns: tuple[str, ...]
) -> Iterator[None]:
    """Keep weights of a checkpoint whose names match out of transformers' log and report.

    The model's class itself is changed while the block runs: with a subclass instead, transformers
    would not convert the names of older checkpoints.
    """
    before = model_class._keys_to_ignore_on_load_unexpected
    expected = [f"^(?:{pattern})" for pattern in patterns]
    model_class._keys_to_ignore_on_load_unexpected = [*(before or []), *expected]
    try:
        yield
    finally:
        model_class._keys_to_ignore_on_load_unexpected = before


def _some(keys: list[str], most: int = 5) -> str:
    shown = ", ".join(keys[:most]) or "nothing"
    return shown if len(keys) <= most else f"{shown} and {len(keys) - most} more"
