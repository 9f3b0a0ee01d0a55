"""Make references: copies of a batch that lack something. A decoder compares both answers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from avllm.tokens import Tokens


@dataclass(frozen=True)
class Reference:
    """A batch with something left out or changed, ready for the LLM.

    Attributes:
        batch: R rows, padded on the left.
        tokens: the connector's output for their clips.
        differs: ``(R,)`` bool, the rows in which anything is different.
    """

    batch: Any
    tokens: dict[str, Tokens]
    differs: Tensor


def without_media(model: Any, batch: Any) -> Reference:
    """Return the rows without their clips; the text around them stays."""
    placeholders = torch.tensor(list(model.config.media_token_ids.values()), dtype=torch.long)
    is_text = ~torch.isin(batch.input_ids, placeholders.to(batch.input_ids.device))
    no_clip = torch.zeros_like(batch.clip_row, dtype=torch.bool)
    rows = keep_tokens(batch, is_text & batch.attention_mask, no_clip)
    return Reference(rows, {}, has_clip(batch))


def with_noise(model: Any, batch: Any, noise: float, seed: int) -> Reference:
    """Return the rows with Gaussian noise in the encoders' features.

    The noise follows from the seed, the row's id, the clip's number and the stream alone.

    Args:
        noise: share of the variance that is noise, from 0 (none) to 1 (only noise). The variance
            as a whole stays, as in the forward process of diffusion.
    """
    features = model.media_steps(batch)[0]  # what the first adapter gets: encoders' features
    noisy = {name: _noisy(name, tokens, batch, noise, seed) for name, tokens in features.items()}
    return Reference(batch, model.connect_for(batch, noisy), has_clip(batch))


def _noisy(stream: str, tokens: Tokens, batch: Any, noise: float, seed: int) -> Tokens:
    """Return one stream's features with noise mixed into the real tokens of each clip."""
    x = tokens.x.clone()  # (B, T, P, D)
    first_clip: dict[int, int] = {}
    for clip, row in enumerate(batch.clip_row.tolist()):
        # A row's clips are consecutive in the batch; this one is the number-th, from 0.
        number = clip - first_clip.setdefault(row, clip)
        # (real tokens, D): with padding, what is drawn would depend on the batch's other clips.
        real = tokens.x[clip][tokens.mask[clip]]
        if not len(real):
            continue
        key = hashlib.sha256(f"{seed}|{batch.ids[row]}|{number}|{stream}".encode()).digest()
        # 56 bits, since a seed is a signed 64-bit number; on the CPU, so that devices agree.
        generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
        drawn = torch.randn(real.shape, generator=generator).to(real.device, real.dtype)
        spread = real.float().std(correction=0).to(real.dtype)  # one number for the whole clip
        x[clip][tokens.mask[clip]] = (1 - noise) ** 0.5 * real + noise**0.5 * spread * drawn
    return tokens.with_x(x)


def last_question(model: Any, batch: Any) -> Reference:
    """Return each row's last question with its own clips.

    Earlier turns and a system prompt are left out. The labels of a prompt mark the answers that it
    holds; the last question follows the last of them.
    """
    length = batch.input_ids.shape[1]
    place = torch.arange(length, device=batch.input_ids.device)
    # The place of the last token that is answered, (R,); -1 where a row answers nothing.
    answered = torch.where(batch.labels >= 0, place, -1).amax(1)
    keep = batch.attention_mask & (place > answered[:, None])  # (R, L)
    begins = batch.attention_mask & (batch.attention_mask.cumsum(1) == 1)
    first = model.llm.config.get_text_config().bos_token_id
    begins &= batch.input_ids == (-1 if first is None else first)
    kept_clips = batch.clip_at > answered[batch.clip_row]  # (B,)
    number = kept_clips.nonzero()[:, 0]
    tokens = {name: stream.select(number) for name, stream in model.media_tokens(batch).items()}
    return Reference(keep_tokens(batch, keep | begins, kept_clips), tokens, answered >= 0)


def keep_tokens(batch: Any, keep: Tensor, kept_clips: Tensor) -> Any:
    """Return a batch of some tokens and clips, padded on the left.

    Args:
        keep: ``(R, L)`` bool, the tokens to keep.
        kept_clips: ``(B,)`` bool, the clips to keep.
    """
    counts = keep.sum(1, keepdim=True)  # (R, 1)
    length = max(1, int(counts.max()))
    real = torch.arange(length, device=keep.device) >= length - counts  # (R, M)
    ids = torch.zeros_like(real, dtype=torch.long)
    ids[real] = batch.input_ids[keep]  # both row by row, in order
    # A clip's new place: the padding, then the kept tokens before it.
    before = torch.nn.functional.pad(keep.cumsum(1), (1, 0)) + length - counts  # (R, L + 1)
    row = batch.clip_row[kept_clips]
    return replace(
        batch,
        input_ids=ids,
        attention_mask=real,
        labels=torch.full_like(ids, -100),
        position_ids=(real.cumsum(1) - 1).clamp(min=0),
        segments=None,
        streams={},  # the connector's output is there already
        clip_row=row,
        clip_at=before[row, batch.clip_at[kept_clips]],
    )


def has_clip(batch: Any) -> Tensor:
    """Return which rows have a clip, ``(R,)`` bool."""
    clips = batch.clip_row.bincount(minlength=batch.input_ids.shape[0])
    return clips > 0
