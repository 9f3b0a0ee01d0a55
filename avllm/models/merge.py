"""Put media tokens into the embedded text."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from avllm.data.collate import Batch
from avllm.tokens import Tokens


def merge_media(
    table: nn.Module,
    input_ids: Tensor,
    token_ids: dict[str, int],
    streams: dict[str, Tokens],
    batch: Batch | None = None,
) -> Tensor:
    """Embed the text and put each media token at the position of its placeholder.

    Within a stream, the k-th placeholder of the batch gets the k-th real token of its clips, in
    time order. The layout has decided how the streams alternate: ``input_ids`` contain it.

    Args:
        table: the LLM's input embeddings.
        input_ids: ``(R, L)``.
        token_ids: id of each stream's placeholder; a stream without one is not in the sequence.
        streams: connector output, ``(B, T, P, D)`` each.
        batch: names the row in the error message.

    Returns:
        ``(R, L, D)``.

    Raises:
        ValueError: more or fewer placeholders than tokens.
    """
    is_media = is_placeholder(input_ids, token_ids)
    embeds = table(input_ids.masked_fill(is_media, 0))  # (R, L, D)
    positions = []
    tokens = []
    for name, token_id in token_ids.items():
        is_stream = input_ids == token_id  # (R, L)
        if name not in streams:
            count = int(is_stream.sum())
            if count:
                raise ValueError(f"{count} <|{name}|> placeholders but no {name} in the batch")
            continue
        _check_count(name, is_stream, streams[name], batch)
        positions.append(is_stream.flatten().nonzero().squeeze(-1))  # (M,)
        tokens.append(streams[name].x[laid_out(streams[name])].to(embeds.dtype))  # (M, D)
    if not positions:
        return embeds
    flat = embeds.flatten(0, 1)  # (R * L, D)
    merged = flat.index_copy(0, torch.cat(positions), torch.cat(tokens))
    return merged.view_as(embeds)


def laid_out(tokens: Tokens) -> Tensor:
    """Return ``(B, T, P)`` bool: the tokens that a loader counted, real or not."""
    return tokens.extra.get("places", tokens.mask)


def surplus_places(
    input_ids: Tensor, token_ids: dict[str, int], streams: dict[str, Tokens]
) -> Tensor:
    """Return ``(R, L)`` bool: placeholders without a token, see ``Adapter.by_content``.

    Args:
        input_ids: ``(R, L)``.
        token_ids: as in :func:`merge_media`.
        streams: as in :func:`merge_media`.
    """
    surplus = torch.zeros_like(input_ids, dtype=torch.bool)
    for name, tokens in streams.items():
        if "places" in tokens.extra and name in token_ids:
            surplus[input_ids == token_ids[name]] = ~tokens.mask[laid_out(tokens)]
    return surplus


def is_placeholder(input_ids: Tensor, token_ids: dict[str, int]) -> Tensor:
    """Return ``(R, L)`` bool, True at the placeholder of a media token."""
    ids = torch.tensor(list(token_ids.values()), dtype=torch.long, device=input_ids.device)
    return torch.isin(input_ids, ids)


def _check_count(name: str, is_stream: Tensor, tokens: Tokens, batch: Batch | None) -> None:
    """Compare the number of placeholders with that of tokens, for each row if a batch is given.

    Raises:
        ValueError: a row has more or fewer placeholders than the connector made tokens for it.
    """
    made = laid_out(tokens).flatten(1).sum(1)  # (B,)
    places = is_stream.sum(1)  # (R,)
    if batch is None:
        if int(places.sum()) != int(made.sum()):
            raise ValueError(_mismatch("", name, int(places.sum()), int(made.sum())))
        return
    by_row = torch.zeros_like(places).index_add_(0, batch.clip_row.to(made.device), made)  # (R,)
    wrong = (by_row != places).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            _mismatch(f"row {batch.ids[row]!r}: ", name, int(places[row]), int(by_row[row]))
        )


def _mismatch(row: str, name: str, places: int, made: int) -> str:
    seen = f"{row}{places} <|{name}|> tokens but the connector made {made}"
    return f"{seen}; was the processor saved with another connector?"
