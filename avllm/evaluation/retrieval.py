"""Retrieval with what contrastive alignment learned: are a clip and its caption nearest to each other?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

from avllm.data.manifest import read_manifest
from avllm.data.row import Row
from avllm.data.schema import MediaPart, Sample
from avllm.errors import UserError
from avllm.evaluation.answering import connect_once
from avllm.evaluation.benchmarks.base import spread
from avllm.evaluation.clips import EncodedClip, Failure, encode_clips, in_chunks
from avllm.evaluation.metrics import Interval, normalise, ranks, wilson
from avllm.models.checkpoint_format import CheckpointError
from avllm.models.modeling_avllm import AVLLM
from avllm.models.processing_avllm import AVProcessor
from avllm.objectives.contrastive import Contrastive, parse_pair
from avllm.precision import choose_precision
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
    clips_at_once: int = 256,
) -> dict[str, Any]:
    """Find each caption's clip among all clips of the manifest, and each clip's captions among all captions.

    A clip may have several captions, each a row: any of them will do. Equal captions count once.

    Args:
        run: folder of a stage-1 run: its connector, and the projections of its contrastive objective.
        manifest: captions, one a row.
        limit: at most so many captions, spread evenly over the manifest.
        batch_size: rows embedded at a time.
        num_workers: processes that decode.
        device: where to compute.
        precision: of the encoders: ``fp32``, ``bf16`` for autocast, or ``auto``.
        clips_at_once: clips whose features are held at a time.

    Returns:
        what :func:`recall` says of captions that look for their clip, and of the other direction as ``clip_to_text``.

    Raises:
        CheckpointError: the run has no contrastive objective. UserError: a clip that cannot be read or embedded.
    """
    choose_precision(precision, "cpu")  # is it one? before anything is loaded
    samples = spread(distinct(read_manifest(manifest)), limit)
    model, processor = AVLLM.from_pretrained(str(run), device=device), AVProcessor.from_pretrained(run)
    objective = contrastive_of(model, run).to(device)
    objective.captions_only = False  # here every row is a caption, whatever kind it is of
    precision = choose_precision(precision, model.device.type)
    shown = [tuple(dict.fromkeys(sample.media)) for sample in samples]
    text: dict[int, Tensor] = {}
    media: dict[tuple[MediaPart, ...], Tensor] = {}
    for places in in_chunks(shown, clips_at_once):
        with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16"):
            rows = make_rows(model, processor, [samples[i] for i in places], Path(manifest).parent, num_workers)
        for first in range(0, len(rows), batch_size):
            chosen = slice(first, first + batch_size)
            vectors = embed_rows(model, processor, objective, rows[chosen])
            for place, of_text, of_media in zip(places[chosen], *(v.float().cpu() for v in vectors), strict=True):
                text[place] = of_text
                media.setdefault(shown[place], of_media)
    scores = torch.stack([text[i] for i in range(len(samples))]) @ torch.stack(list(media.values())).T
    if not torch.isfinite(scores).all():
        raise UserError(f"{run}: the embeddings are not finite; the run diverged, or {precision} is too narrow for it")
    number = {clips: i for i, clips in enumerate(media)}
    own = np.eye(len(media), dtype=bool)[[number[clips] for clips in shown]]
    return recall(scores.numpy(), own) | {"clip_to_text": recall(scores.numpy().T, own.T)}


def make_rows(
    model: AVLLM, processor: AVProcessor, samples: Sequence[Sample], root: Path, num_workers: int
) -> list[Row]:
    """Rows of samples whose clips are encoded, each clip once.

    Raises:
        UserError: a clip cannot be read, or a row cannot be made.
    """
    parts = list(dict.fromkeys(part for sample in samples for part in sample.media))
    encoded = encode_clips(model, processor, parts, root, num_workers=num_workers)
    rows = []
    for sample in samples:
        clips = [encoded[part] for part in sample.media]
        broken = next((c.detail for c in clips if isinstance(c, Failure)), None)
        try:
            if broken is not None:
                raise UserError(broken)
            rows.append(processor.row(sample, [c.streams for c in clips if isinstance(c, EncodedClip)]))
        except UserError as error:
            raise UserError(f"row {sample.id!r}: {error}") from error
    return rows


def recall(scores: np.ndarray, own: np.ndarray) -> dict[str, Any]:
    """Return how often a query's item is among the first 1, 5 and 10.

    Args:
        scores: ``(n, m)`` of n queries and m items. own: ``(n, m)`` bool, the items that are right.

    Returns:
        ``n`` queries, ``among`` items, the shares ``r1``, ``r5`` and ``r10`` with their 95% intervals (``r1_low``,
        ``r1_high``, ...), ``median_rank``, and ``chance``, the share ``r1`` of a guess.
    """
    place = ranks(scores, own)
    n = len(place)
    found: dict[str, Any] = {"n": n, "among": scores.shape[1]}
    for k in (1, 5, 10):
        interval: Interval = wilson(int((place <= k).sum()), n)
        found |= {f"r{k}": float((place <= k).mean()), f"r{k}_low": interval.low, f"r{k}_high": interval.high}
    return found | {"median_rank": float(np.median(place)), "chance": float(own.mean(1).mean())}


def recall_table(found: dict[str, Any]) -> Table:
    """The figures of :func:`retrieval` for the terminal, a direction a line."""
    made = Table(title="retrieval", title_justify="left", header_style="bold", box=SIMPLE_HEAD)
    for column in ("", "n", "among", "R@1", "95%", "R@5", "95%", "R@10", "95%", "median rank", "chance"):
        made.add_column(column, justify="right" if column else "left")
    for name, row in (("text to clip", found), ("clip to text", found["clip_to_text"])):
        shares = [
            text
            for k in (1, 5, 10)
            for text in (f"{100 * row[f'r{k}']:.1f}", f"{100 * row[f'r{k}_low']:.1f}-{100 * row[f'r{k}_high']:.1f}")
        ]
        ends = (f"{row['median_rank']:g}", f"{100 * row['chance']:.1f}")
        made.add_row(name, str(row["n"]), str(row["among"]), *shares, *ends)
    return made


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
    with_text = {p: parse_pair(p).left for p in pairs if not parse_pair(p).right}
    fitting = [p for p, left in with_text.items() if set(left) <= streams]
    if not fitting:
        raise UserError(
            f"row {row.id!r} has {sorted(streams) or 'no media'}; the objective was trained on {pairs} only"
        )
    return max(fitting, key=lambda p: len(with_text[p]))
