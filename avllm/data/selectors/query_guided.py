"""Keep the moments that a question is about, as LSTP does (arXiv 2402.16050, section 3.2).

LSTP's temporal prompt sampler scores the moments of a long video with a light module, before any
frame is encoded; only frames of the best spans go to the encoder.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from avllm.data.media.load import Clip
from avllm.data.selectors.base import Selector
from avllm.errors import loading

SIDE = 32  # pixels to which frames are shrunk before their differences are taken
BATCH = 32  # frames that are scored at a time


class QueryGuided(Selector):
    """Score the frames, take the best moments, and keep the frames around each.

    ``model.sampling`` says how many frames are decoded as candidates.

    Args:
        frames: how many are kept; a clip with fewer keeps all.
        spans: in how many moments at most; each gets an equal share of the frames.
        scorer: ``motion``: how much a frame differs from the one before, whatever is asked (LSTP
            reads optical flow, of which this is the cheapest form). ``clip``: how well a frame fits
            the question, by a CLIP model.
        name: hub name or folder of that model.

    Raises:
        ValueError: a number below 1, an unknown scorer, or ``clip`` without a name.
    """

    def __init__(
        self, *, frames: int = 8, spans: int = 1, scorer: str = "motion", name: str | None = None
    ) -> None:
        if frames < 1 or not 1 <= spans <= frames:
            raise ValueError(
                f"query_guided has frames {frames} and spans {spans}; expected 1 or more frames, "
                "and a span for each at most"
            )
        if scorer not in ("motion", "clip"):
            raise ValueError(f"query_guided has scorer {scorer!r}; expected 'motion' or 'clip'")
        if (scorer == "clip") != (name is not None):
            raise ValueError(
                f"query_guided has scorer {scorer!r} and name {name!r}; 'clip' needs the name of a "
                "CLIP model, and 'motion' has none"
            )
        self.frames = frames
        self.spans = spans
        self.name = name

    def select(self, clip: Clip, question: str) -> Clip:
        if clip.frames is None or len(clip.frames.x) <= self.frames:
            return clip
        pictures = clip.frames.x
        if self.name is not None and question:
            scores = question_scores(pictures, question, self.name)
        else:
            scores = motion_scores(pictures)
        kept = best_moments(scores, self.frames, self.spans)
        chosen = replace(clip.frames, x=pictures[kept], span=clip.frames.span[kept])
        return replace(clip, frames=chosen)


def motion_scores(pictures: Tensor) -> Tensor:
    """Return the mean change of brightness from the frame before, ``(T, H, W, 3)`` -> ``(T,)``."""
    small: list[Tensor] = []
    for part in pictures.split(BATCH):
        grey = part.float().mean(-1)[:, None]  # (t, 1, H, W)
        small.append(torch.nn.functional.adaptive_avg_pool2d(grey, SIDE)[:, 0])
    grey = torch.cat(small)  # (T, SIDE, SIDE)
    change = (grey[1:] - grey[:-1]).abs().mean((1, 2))  # (T - 1,)
    return torch.cat([change[:1], change])


@torch.no_grad()
def question_scores(pictures: Tensor, question: str, name: str) -> Tensor:
    """Return the cosine of each frame and the question in CLIP's space, ``(T,)``."""
    model, processor = _clip(name)
    asked = processor(text=[question], return_tensors="pt", padding=True, truncation=True)
    text = model.get_text_features(**asked)
    text = _unit(text)
    scores: list[Tensor] = []
    for part in pictures.split(BATCH):
        shown = processor(images=list(part.numpy()), return_tensors="pt")
        scores.append(_unit(model.get_image_features(**shown)) @ text[0])
    return torch.cat(scores)


def best_moments(scores: Tensor, frames: int, spans: int) -> Tensor:
    """Return the frames to keep, ascending: those around the best, then around the next best.

    Args:
        scores: ``(T,)``, T more than ``frames``.
        frames: how many to keep.
        spans: how many moments share them. A frame that is kept already is no new moment.
    """
    total = len(scores)
    taken = torch.zeros(total, dtype=torch.bool)
    for span in range(spans):
        share = frames // spans + (span < frames % spans)
        best = int(scores.masked_fill(taken, -torch.inf).argmax())
        distance = (torch.arange(total) - best).abs().masked_fill(taken, total)
        taken[distance.argsort(stable=True)[:share]] = True
    return taken.nonzero()[:, 0]


def _unit(features: Any) -> Tensor:
    """Return unit vectors of CLIP's features, which newer versions wrap."""
    x: Tensor = getattr(features, "pooler_output", features)
    return torch.nn.functional.normalize(x, dim=-1)


@lru_cache(maxsize=1)
def _clip(name: str) -> tuple[Any, Any]:
    """Load a CLIP model once a process."""
    from transformers import AutoProcessor, CLIPModel

    with loading("query_guided's CLIP model", name):
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
        model = CLIPModel.from_pretrained(name)
    return model.requires_grad_(False).eval(), processor
