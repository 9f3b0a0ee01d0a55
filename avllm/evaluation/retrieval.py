"""Search clips by caption and captions by clip, with the embeddings of contrastive alignment."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
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
from avllm.evaluation.clips import Failure, encode_clips, in_chunks
from avllm.evaluation.sampling import draw_rows, sort_rows
from avllm.evaluation.scoring.metrics import ranks, wilson
from avllm.evaluation.scoring.words import normalise
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
    seed: int = 0,
    batch_size: int = 32,
    num_workers: int = 0,
    device: str = "cpu",
    precision: str = "fp32",
    clips_at_once: int = 256,
    backbones: dict[str, str] | None = None,
    allow_parts: Collection[str] = (),
) -> dict[str, Any]:
    """Search each caption's clip among all clips, and each clip's captions among all captions.

    A clip may have several captions, each a row: any of them is right. Equal captions count once.

    Args:
        run: folder of a stage-1 run with its connector and the projections of its contrastive
            objective.
        manifest: captions, one a row.
        limit: at most so many captions, of each kind its share.
        seed: of their draw.
        batch_size: rows embedded at a time.
        num_workers: processes that decode.
        device: where to compute.
        precision: of the encoders: ``fp32``, ``bf16`` for autocast, or ``auto``.
        clips_at_once: clips whose features are held at a time.
        backbones: other folders of backbones.
        allow_parts: parts from outside of the package that the checkpoint may name.

    Returns:
        :func:`recall` of captions that look for their clip, and of the other direction under
        ``clip_to_text``.

    Raises:
        CheckpointError: the run has no contrastive objective.
        UserError: a clip that cannot be read or embedded.
    """
    choose_precision(precision, "cpu")  # checks the name before anything is loaded
    samples = draw_rows(distinct(read_manifest(manifest)), limit, seed)
    model = AVLLM.from_pretrained(
        str(run), device=device, backbones=backbones, allow_parts=allow_parts
    )
    processor = AVProcessor.from_pretrained(run, allow_parts=allow_parts)
    objective = contrastive_of(model, run, allow_parts).to(device)
    objective.captions_only = False  # a manifest's rows are captions here, whatever their kind
    precision = choose_precision(precision, model.device.type)
    clips_of = [tuple(dict.fromkeys(sample.media)) for sample in samples]
    text: dict[int, Tensor] = {}  # caption's embedding by its place
    media: dict[tuple[MediaPart, ...], Tensor] = {}
    for places in in_chunks(clips_of, clips_at_once):
        chunk = [samples[place] for place in places]
        with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16"):
            rows = make_rows(model, processor, chunk, Path(manifest).parent, num_workers)
        for first in range(0, len(rows), batch_size):
            chosen = slice(first, first + batch_size)
            embedded = embed_rows(model, processor, objective, rows[chosen])
            texts = embedded.text.float().cpu()
            medias = embedded.media.float().cpu()
            for number, place in enumerate(places[chosen]):
                text[place] = texts[number]
                media.setdefault(clips_of[place], medias[number])
    captions = torch.stack([text[place] for place in range(len(samples))])  # (n, dim)
    scores = captions @ torch.stack(list(media.values())).T  # (n, m)
    if not torch.isfinite(scores).all():
        raise UserError(
            f"{run}: the embeddings are not finite; expected finite ones: "
            f"the run diverged, or {precision} is too narrow for it"
        )
    number_of = {clips: number for number, clips in enumerate(media)}
    own = np.eye(len(media), dtype=bool)[[number_of[clips] for clips in clips_of]]  # (n, m)
    return recall(scores.numpy(), own) | {"clip_to_text": recall(scores.numpy().T, own.T)}


def make_rows(
    model: AVLLM, processor: AVProcessor, samples: Sequence[Sample], root: Path, num_workers: int
) -> list[Row]:
    """Make rows of samples; each clip is encoded once.

    Raises:
        UserError: a clip cannot be read, or a row cannot be made.
    """
    parts = list(dict.fromkeys(part for sample in samples for part in sample.media))
    encoded = encode_clips(model, processor, parts, root, num_workers=num_workers)
    rows = []
    for sample in samples:
        clips = [encoded[part] for part in sample.media]
        streams = []
        for clip in clips:
            if isinstance(clip, Failure):
                raise UserError(f"row {sample.id!r}: {clip.detail}")
            streams.append(clip.streams)
        try:
            rows.append(processor.row(sample, streams))
        except UserError as error:
            raise UserError(f"row {sample.id!r}: {error}") from error
    return rows


def recall(scores: np.ndarray, own: np.ndarray) -> dict[str, Any]:
    """Return how often a query's item is among the first 1, 5 and 10.

    Args:
        scores: ``(n, m)`` of n queries and m items. own: ``(n, m)`` bool, the items that are right.

    Returns:
        ``n`` queries, ``among`` items, the shares ``r1``, ``r5`` and ``r10`` with their 95%
        intervals (``r1_low``, ``r1_high``, ...), ``median_rank``, and ``chance``, the share ``r1``
        of a guess.
    """
    rank = ranks(scores, own)  # (n,)
    figures: dict[str, Any] = {"n": len(rank), "among": scores.shape[1]}
    for k in (1, 5, 10):
        is_among = rank <= k
        interval = wilson(int(is_among.sum()), len(rank))
        figures[f"r{k}"] = float(is_among.mean())
        figures[f"r{k}_low"] = interval.low
        figures[f"r{k}_high"] = interval.high
    figures["median_rank"] = float(np.median(rank))
    figures["chance"] = float(own.mean(1).mean())
    return figures


def recall_table(figures: dict[str, Any]) -> Table:
    """Return the figures of :func:`retrieval` for the terminal, a direction a line."""
    made = Table(title="retrieval", title_justify="left", header_style="bold", box=SIMPLE_HEAD)
    recalls = ("R@1", "95%", "R@5", "95%", "R@10", "95%")
    for column in ("", "n", "among", *recalls, "median rank", "chance"):
        made.add_column(column, justify="right" if column else "left")
    for name, row in (("text to clip", figures), ("clip to text", figures["clip_to_text"])):
        shares = []
        for k in (1, 5, 10):
            low = 100 * row[f"r{k}_low"]
            high = 100 * row[f"r{k}_high"]
            shares += [f"{100 * row[f'r{k}']:.1f}", f"{low:.1f}-{high:.1f}"]
        ends = (f"{row['median_rank']:g}", f"{100 * row['chance']:.1f}")
        made.add_row(name, str(row["n"]), str(row["among"]), *shares, *ends)
    return made


def distinct(samples: Sequence[Sample]) -> list[Sample]:
    """Return one row of each caption: equal captions of two clips cannot be distinguished."""
    first: dict[str, Sample] = {}
    for sample in sort_rows(samples):
        first.setdefault(normalise(sample.answer or ""), sample)
    return list(first.values())


def contrastive_of(model: AVLLM, run: str | Path, allow_parts: Collection[str] = ()) -> Contrastive:
    """Return the contrastive objective that the run's last stage trained.

    Raises:
        CheckpointError: it trained none, or one that is not allowed.
    """
    for objective in load_objectives(model, run, allow_parts).values():
        if isinstance(objective, Contrastive):
            return objective
    raise CheckpointError(
        f"{run} was not trained with the contrastive objective; expected a stage-1 run"
    )


@dataclass(frozen=True)
class Embedded:
    """Unit vectors ``(R, dim)`` of R rows' captions and of their clips."""

    text: Tensor
    media: Tensor


@torch.no_grad()
def embed_rows(
    model: AVLLM, processor: AVProcessor, objective: Contrastive, rows: list[Row]
) -> Embedded:
    """Embed the rows' captions and their clips, each clip by all the streams that it has."""
    batch = processor.collate(rows).to(model.device)
    if model.connector.conditioned:
        streams = model.media_tokens(batch)
    else:
        streams = connect_once(model, rows)
    text = objective.embed_text(model, batch)  # (R, dim)
    media = torch.zeros_like(text)
    by_pair: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        by_pair.setdefault(pair_for(row, objective.pairs), []).append(place)
    for pair, places in by_pair.items():
        media[places] = objective.embed_media(streams, batch, pair)[places]
    return Embedded(text, media)


def pair_for(row: Row, pairs: Sequence[str]) -> str:
    """Return the pair with text that reads most streams of a row's clips.

    Raises:
        UserError: the clips lack a stream of every pair.
    """
    streams = {name for clip in row.clips for name in clip}
    best = ""
    most = 0
    for pair in pairs:
        sides = parse_pair(pair)
        is_with_text = not sides.right
        if is_with_text and set(sides.left) <= streams and len(sides.left) > most:
            best = pair
            most = len(sides.left)
    if not best:
        raise UserError(
            f"row {row.id!r} has {sorted(streams) or 'no media'}; "
            f"expected the streams of one of the trained pairs {pairs}"
        )
    return best
