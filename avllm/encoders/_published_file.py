"""Load encoders from the weight files that their authors publish."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PretrainedConfig

from avllm.encoders._backbone import Backbone
from avllm.published import Published
from avllm.weights import check_finite


class PublishedBackbone(Backbone):
    """A model of this package; ``name`` is a folder as of any backbone, or the published file."""

    @classmethod
    def published_config(cls, file: Published) -> PretrainedConfig:
        """Return the config of a published file; what it reads off tensors counts as used.

        Raises:
            PublishedError: the file is of another model.
        """
        raise NotImplementedError(f"{cls.__name__}.published_config")

    @classmethod
    def take(cls, file: Published, model: Any) -> dict[str, Tensor]:
        """Return the model's weights out of a published file, by the model's names.

        Raises:
            PublishedError: a tensor is missing, left over or of another shape.
        """
        raise NotImplementedError(f"{cls.__name__}.take")

    @classmethod
    def saved_config(cls, name_or_path: str, revision: str | None = None) -> PretrainedConfig:
        """Return the config of a folder or of a published file."""
        if Path(name_or_path).is_file():
            return cls.published_config(Published.read(name_or_path))
        return super().saved_config(name_or_path, revision)

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
        """Load a folder or a published file, see :meth:`Backbone.from_pretrained`.

        Raises:
            PublishedError: see :meth:`published_config` and :meth:`take`.
        """
        if not Path(name_or_path).is_file():
            return super().from_pretrained(
                name_or_path, layers=layers, dtype=dtype, revision=revision, **options
            )
        file = Published.read(name_or_path)
        encoder = cls(cls.published_config(file), layers=layers, **options)
        encoder.backbone.load_state_dict(cls.take(file, encoder.backbone))
        check_finite(encoder.backbone.named_parameters(), f"the encoder {name_or_path}")
        if dtype is not None:
            backbone: torch.nn.Module = encoder.backbone
            backbone.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        return encoder.eval()
