"""Choose how an evaluation runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avllm.inference.generation import Generation
from avllm.precision import choose_precision


@dataclass(frozen=True)
class Settings:
    """Choose how an evaluation runs.

    Attributes:
        batch_size: rows generated at a time.
        seed: of the rows of a limit, of partners and of the bootstrap.
        max_new_tokens: of an answer; None takes twice the longest reference and four more.
        num_workers: processes that decode.
        clips_at_once: distinct clips whose features are held at a time.
        max_skip_rate: share of rows that may fail (missing file, too long) before it stops.
        cache: folder of features that a run left behind, or None.
        decoding: ``{"type", **options}`` of a decoder, or None.
        precision: ``fp32``, ``bf16`` for autocast, or ``auto``, as in ``train.precision``.
    """

    batch_size: int = 128
    seed: int = 0
    max_new_tokens: int | None = None
    num_workers: int = 0
    clips_at_once: int = 256
    max_skip_rate: float = 0.01
    cache: str | Path | None = None
    precision: str = "fp32"
    decoding: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        Generation(decoding=self.decoding)
        choose_precision(self.precision, "cpu")  # raises for an unknown one
