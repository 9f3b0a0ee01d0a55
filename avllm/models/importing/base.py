"""Define an importer, which makes a model out of weight files as another project publishes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PretrainedConfig

from avllm.errors import UserError
from avllm.models.connector import Connector
from avllm.published import Published
from avllm.registry import suggest


class Dims:
    """Numbers of a model that its tensors do not show, and those that they show, to compare.

    Args:
        defaults: by ``section.field``, those of the published model; None for sizes that are read
            off the tensors.
        given: the content of the user's file, ``{section: {field: number}, field: number}``.

    Raises:
        UserError: a field that the model does not have, or a value that is no number.
    """

    def __init__(self, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> None:
        self.values = dict(defaults)
        self._given = _flat(given)
        for name, value in self._given.items():
            if name not in defaults:
                raise UserError(f"dims has {name}; {suggest(name, list(defaults))}", reason="dims")
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise UserError(f"dims has {name} {value!r}; expected a number", reason="dims")
        self.values |= self._given

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def compare(self, read: Mapping[str, int]) -> None:
        """Compare sizes that were read off the tensors with those that the user gave.

        Raises:
            UserError: ``dims``: they differ; names the first.
        """
        for name, value in read.items():
            if name in self._given and self._given[name] != value:
                raise UserError(
                    f"dims has {name} {self._given[name]}, the tensors have {value}; correct it, "
                    "or leave it out",
                    reason="dims",
                )


def _flat(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``{"section.field": value}`` of a nested mapping."""
    flat: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": x for inner, x in value.items()}
        else:
            flat[name] = value
    return flat


@dataclass(frozen=True)
class BackboneFiles:
    """Hold a frozen backbone in the form in which transformers saves one.

    Attributes:
        config: with its model type.
        state: the tensors, by the names of the encoder's own model.
        preprocessing: the content of ``preprocessor_config.json``.
    """

    config: PretrainedConfig
    state: dict[str, Tensor]
    preprocessing: dict[str, Any]


@dataclass(frozen=True)
class AdapterSource:
    """Say which tensors an adapter of the connector, or a LoRA set of the LLM, takes.

    Attributes:
        spec: ``{"type", **options}`` of the adapter; of LoRA the fields of ``LoraConfig``.
        file: where its tensors are.
        published: turns our name of a tensor, in the adapter or the LLM, into the published one.
    """

    spec: dict[str, Any]
    file: Published
    published: Callable[[str], str]


@dataclass
class Converted:
    """Hold what an importer makes.

    Attributes:
        encoders: sections of encoders by stream; those with weights in ``backbones`` have no name.
        backbones: the weights of encoders that are converted, by stream.
        adapters: the connector, in order.
        lora: the LLM's adapters, if it has any.
        model: further fields of a preset's ``model`` section.
    """

    encoders: dict[str, dict[str, Any]] = field(default_factory=dict)
    backbones: dict[str, BackboneFiles] = field(default_factory=dict)
    adapters: list[AdapterSource] = field(default_factory=list)
    lora: AdapterSource | None = None
    model: dict[str, Any] = field(default_factory=dict)

    @property
    def connector(self) -> list[dict[str, Any]]:
        """Return the connector's specs."""
        return [adapter.spec for adapter in self.adapters]

    def weights(self, widths: dict[str, int], llm_dim: int) -> dict[str, Tensor]:
        """Return the connector's weights, float32, by their names in the connector.

        Args:
            widths: of the encoders' streams.
            llm_dim: width of the LLM's embeddings.

        Raises:
            PublishedError: a tensor is missing, left over or of another shape.
        """
        with torch.device("meta"):
            connector = Connector(self.connector, widths, llm_dim)
        weights: dict[str, Tensor] = {}
        for place, (source, adapter) in enumerate(zip(self.adapters, connector, strict=True)):
            taken = source.file.take(adapter.state_dict(), source.published)
            weights |= {f"{place}.{name}": x.float() for name, x in taken.items()}
        return weights


class Importer:
    """Read published files and say which model they make.

    The keyword-only arguments of a subclass's constructor are the published files, each a path.
    They become the options of ``avllm ckpt import NAME``.

    Attributes:
        defaults: see :class:`Dims`.
        inputs: arrays of a golden file that are given, and not compared.
    """

    defaults: ClassVar[Mapping[str, Any]] = {}
    inputs: ClassVar[tuple[str, ...]] = ()

    @property
    def sources(self) -> list[Path]:
        """Return the files that are read."""
        raise NotImplementedError(f"{type(self).__name__}.sources")

    def convert(self, dims: Dims, allow: Sequence[str]) -> Converted:
        """Read the files.

        Args:
            dims: numbers that no tensor shows.
            allow: regular expressions of tensors that may be missing or left over.

        Raises:
            PublishedError: a file or a tensor is missing, left over or of another shape.
            UserError: sizes that contradict each other.
        """
        raise NotImplementedError(f"{type(self).__name__}.convert")

    @classmethod
    def replay(
        cls, model: Any, arrays: Mapping[str, Tensor], values: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Compute with an imported model what the original computed.

        Args:
            model: an AVLLM.
            arrays: the inputs, by the names of ``inputs``; those of a branch that the model lacks
                are not read.
            values: of the :class:`Dims` with which the model was imported.

        Returns:
            arrays by the names that they have in a golden file.
        """
        raise NotImplementedError(f"{cls.__name__}.replay")
