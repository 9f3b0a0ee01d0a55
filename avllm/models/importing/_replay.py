"""Run an imported model on the inputs of a golden file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from avllm.data.row import IGNORE
from avllm.errors import UserError
from avllm.tokens import StreamBatch, Tokens


def stream_of_units(name: str, units: Tensor, clips: int, tokens: int) -> StreamBatch:
    """Return clips of as many units each, a second a unit.

    Args:
        name: of the encoder's input.
        units: ``(B * T, ...)``.
        clips: B.
        tokens: P, of a unit.
    """
    steps = len(units) // clips
    span = _clock(clips, steps, 1.0)
    mask = torch.ones(clips, steps, tokens, dtype=torch.bool)
    return StreamBatch({name: units}, torch.full((clips,), steps), span, mask)


def features_of_clips(x: Tensor, seconds: float = 1.0) -> Tokens:
    """Return features ``(B, T, P, D)`` as tokens with a clock of as many seconds a step."""
    mask = torch.ones(x.shape[:3], dtype=torch.bool)
    return Tokens(x, mask, _clock(len(x), x.shape[1], seconds))


def _clock(clips: int, steps: int, seconds: float) -> Tensor:
    """Return steps of equal length that follow one another, ``(B, T, 2)``."""
    edges = torch.arange(steps + 1, dtype=torch.float32) * seconds
    return torch.stack([edges[:-1], edges[1:]], 1).expand(clips, -1, -1)


def next_token_arrays(
    model: Any, arrays: Mapping[str, Tensor], tokens: Tensor, values: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Compute logits, and the loss where there are labels, of rows with the video's tokens.

    Args:
        model: an AVLLM.
        arrays: ``input_ids (R, L)``, and ``labels (R, L)``.
        tokens: ``(R, Q, D)``, which take the places of one token id.
        values: ``image_token_id`` is this id.

    Raises:
        UserError: the id is not known.
    """
    image = values.get("image_token_id")
    if image is None:
        raise UserError(
            "the golden file has input_ids, but the checkpoint was imported without the id that "
            "media have in them; import it with image_token_id in dims",
            reason="image_token_id",
        )
    ids = arrays["input_ids"]
    is_media = ids == int(image)  # (R, L)
    # Text may use any id, also that of our placeholder: it is embedded by itself.
    embeds = model.llm.get_input_embeddings()(ids.masked_fill(is_media, 0))
    placeholder = model.config.media_token_ids["video"]
    stream = {"video": _as_clips(tokens)}
    media = model.merge_media(torch.where(is_media, placeholder, 0), stream)
    embeds = torch.where(is_media.unsqueeze(-1), media, embeds)  # (R, L, D)
    logits = model.llm(inputs_embeds=embeds, use_cache=False).logits  # (R, L, V)
    made = {"logits": logits}
    if "labels" in arrays:
        flat = logits[:, :-1].flatten(0, 1).float()
        made["loss"] = F.cross_entropy(flat, arrays["labels"][:, 1:].flatten(), ignore_index=IGNORE)
    return made


def _as_clips(tokens: Tensor) -> Tokens:
    """Return tokens ``(R, Q, D)`` as one step a clip."""
    mask = torch.ones(len(tokens), 1, tokens.shape[1], dtype=torch.bool)
    return Tokens(tokens.unsqueeze(1), mask, torch.zeros(len(tokens), 1, 2))
