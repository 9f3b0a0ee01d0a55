"""Text-to-clip retrieval with what contrastive alignment learned: is a clip nearest to its own caption?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from avllm.data.collate import Row
from avllm.data.manifest import read_manifest
from avllm.data.schema import Sample
from avllm.errors import UserError
from avllm.evaluation.answering import connect_once
from avllm.evaluation.benchmarks.manifest import spread
from avllm.evaluation.clips import EncodedClip, Failure, encode_clips
from avllm.evaluation.metrics import Interval, normalise, ranks, wilson
from avllm.models.checkpoint import CheckpointError
from avllm.models.modeling_avllm import AVLLM
from avllm.models.processing_avllm import AVProcessor
from avllm.objectives.contrastive import STREAMS_OF, Contrastive
from avllm.training.task import load_objectives


def retrieval(
    run: str | Path,
    manifest: str | Path,
    *,
    limit: int | None = 200,
    batch_size: int = 32,
    num_workers: int = 0,
    device: str = "cpu",
    precision: str = "fp32",
) -> dict[str, Any]:
    """Find each caption's clip among all clips of the manifest (those with distinct captions).

    Args:
        run: folder of a stage-1 run: its connector, and the projections of its contrastive objective.
        manifest: captions, one a row.
        limit: at most so many clips, spread evenly over the manifest.
        batch_size: rows embedded at a time.
        num_workers: processes that decode.
        device: where to compute.
        precision: of the encoders: ``fp32``, or ``bf16`` for autocast.

    Returns:
        ``n``, ``r1``, ``r5``, ``r10`` (shares), ``r1_low`` and ``r1_high`` (95%), ``median_rank``, ``chance`` (1 / n).

    Raises:
        CheckpointError: the run has no contrastive objective. ValueError: a clip that cannot be read or embedded.
    """
    model, processor = AVLLM.from_pretrained(str(run), device=device), AVProcessor.from_pretrained(run)
    objective = contrastive_of(model, run).to(device)
    samples = spread(distinct(read_manifest(manifest)), limit)
    parts = list(dict.fromkeys(part for s in samples for part in s.media))
    with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16"):
        encoded = encode_clips(model, processor, parts, Path(manifest).parent, num_workers=num_workers)
    rows = []
    for sample in samples:
        clips = [encoded[part] for part in sample.media]
        broken = next((c for c in clips if isinstance(c, Failure)), None)
        if broken is not None:
            raise UserError(f"{manifest}: row {sample.id!r}: {broken.detail}")
        rows.append(processor.row(sample, [c.streams for c in clips if isinstance(c, EncodedClip)]))
    text, media = [], []
    for first in range(0, len(rows), batch_size):
        t, m = embed_rows(model, processor, objective, rows[first : first + batch_size])
        text.append(t)
        media.append(m)
    return recall((torch.cat(text) @ torch.cat(media).T).cpu().numpy())


def recall(scores: np.ndarray) -> dict[str, Any]:
    """Recall at 1, 5 and 10 and the median rank of ``scores (n, n)``, text by clip, own pairs on the diagonal."""
    place = ranks(scores)
    n = len(place)
    at: dict[str, Any] = {f"r{k}": float((place <= k).mean()) for k in (1, 5, 10)}
    interval: Interval = wilson(int((place <= 1).sum()), n)
    return {"n": n, **at, "r1_low": interval.low, "r1_high": interval.high} | {
        "median_rank": float(np.median(place)),
        "chance": 1 / n,
    }


def distinct(samples: Sequence[Sample]) -> list[Sample]:
    """The first row of each caption: equal captions of two clips could not be told apart."""
    first: dict[str, Sample] = {}
    for sample in samples:
        first.setdefault(normalise(sample.answer or ""), sample)
    return list(first.values())


def contrastive_of(model: AVLLM, run: str | Path) -> Contrastive:
    """The contrastive objective that the run's last stage trained."""
    found = [o for o in load_objectives(model, run).values() if isinstance(o, Contrastive)]
    if not found:
        raise CheckpointError(f"{run} was not trained with the contrastive objective; expected a stage-1 run")
    return found[0]


@torch.no_grad()
def embed_rows(model: AVLLM, processor: AVProcessor, objective: Contrastive, rows: list[Row]) -> tuple[Tensor, Tensor]:
    """Unit vectors ``(R, dim)`` of the rows' captions and of their clips, each clip by all the streams that it has."""
    batch = processor.collate(rows).to(model.device)
    streams = model.media_tokens(batch) if model.connector.conditioned else connect_once(model, rows)
    text = objective.embed_text(model, batch)  # (R, dim)
    media = torch.zeros_like(text)
    by_pair: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        by_pair.setdefault(pair_for(row, objective.pairs), []).append(place)
    for pair, places in by_pair.items():
        media[places] = objective.embed_media(streams, batch, pair)[places]
    return text, media


def pair_for(row: Row, pairs: Sequence[str]) -> str:
    """The pair that reads most of what a row's clips have.

    Raises:
        ValueError: none of the pairs does.
    """
    streams = {name for clip in row.clips for name in clip}
    fitting = [p for p in pairs if set(STREAMS_OF[p]) <= streams]
    if not fitting:
        raise UserError(
            f"row {row.id!r} has {sorted(streams) or 'no media'}; the objective was trained on {pairs} only"
        )
    return max(fitting, key=lambda p: len(STREAMS_OF[p]))
