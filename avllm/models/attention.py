"""Make the LLM's attention masks: padding, packed rows, sliding windows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from avllm.data.collate import Batch, collate
from avllm.data.packing import fill_sequences
from avllm.data.row import text_row
from avllm.errors import UserError

FULL, SLIDING = "full_attention", "sliding_attention"  # as transformers names the kinds of layers
MASKED = ("sdpa", "eager")  # implementations that take a mask of any form
PROBE = 5  # tokens of each of the two texts of the trial
# Largest difference in the trial, as a share of the largest number: for float32, for the rest.
EXACT, ROUNDED = 1e-4, 5e-2


class PackingError(UserError):
    """Packed rows would give this model or these objectives other results than single rows."""


def llm_inputs(config: Any, embeds: Tensor, batch: Batch) -> dict[str, Any]:
    """Return the LLM's keyword arguments for embedded rows.

    Args:
        config: the LLM's.
        embeds: ``(R, L, D)``.
        batch: the rows.
    """
    mask: Tensor | dict[str, Tensor] = batch.attention_mask.long()
    if batch.segments is not None:
        mask = packed_mask(config, batch, embeds.dtype)
    return {
        "inputs_embeds": embeds,
        "attention_mask": mask,
        "position_ids": batch.position_ids,
        "use_cache": False,
    }


def packed_mask(config: Any, batch: Batch, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
    """Return the mask ``(R, 1, L, L)`` of a packed batch, or one mask for each kind of layer.

    For SDPA the mask is bool, a quarter of the memory of float32; the eager implementation adds a
    float mask to the scores. transformers passes masks of this form on unchanged, so that they have
    to contain the window of sliding layers.
    """
    assert batch.segments is not None
    mask_dtype = torch.bool if config._attn_implementation == "sdpa" else dtype
    masks = {}
    for kind, window in layer_windows(config).items():
        masks[kind] = block_mask(batch.segments, mask_dtype, batch.position_ids, window)
    return masks if len(masks) > 1 else next(iter(masks.values()))


def layer_windows(config: Any) -> dict[str, int | None]:
    """Return how many tokens the layers of each kind look back; None for no limit.

    Raises:
        PackingError: layers of an unknown kind, or recurrent ones, which see other rows in spite of
            a mask.
    """
    config = config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = sorted(set(getattr(config, "layer_types", None) or []))
    if not kinds:
        kinds = [SLIDING if window else FULL]
    unknown = [kind for kind in kinds if kind not in (FULL, SLIDING)]
    if unknown:
        raise PackingError(
            f"data.pack is set, but the LLM ({config.model_type}) has layers of kind "
            f"{', '.join(unknown)}, which no mask keeps from mixing the rows of a sequence; "
            "expected attention, full or sliding. Leave out data.pack",
            reason="layer_kind",
        )
    return {kind: window if kind == SLIDING else None for kind in kinds}


def block_mask(
    segments: Tensor, dtype: torch.dtype, positions: Tensor | None = None, window: int | None = None
) -> Tensor:
    """Return the mask ``(R, 1, L, L)`` of packed rows.

    A token sees earlier tokens of its group that are in the same part or in the shared part (0).
    Padding sees itself, so that no row of the softmax is empty.

    Args:
        segments: ``(R, L, 2)`` long (group, part), see :class:`avllm.data.collate.Batch`.
        dtype: bool (True = seen), or a float dtype for a mask that is added to the scores.
        positions: ``(R, L)`` long, needed with ``window``.
        window: how many positions are seen, the token's own included; None for no limit.
    """
    group, part = segments.unbind(-1)  # (R, L)
    length = group.shape[1]
    allowed = (part[:, :, None] == part[:, None, :]) | (part[:, None, :] == 0)  # (R, L, L)
    allowed &= group[:, :, None] == group[:, None, :]
    allowed &= torch.ones(length, length, dtype=torch.bool, device=group.device).tril()
    if window is not None and positions is not None:
        allowed &= positions[:, :, None] - positions[:, None, :] < window
    if dtype != torch.bool:
        mask = torch.zeros(allowed.shape, dtype=dtype, device=group.device)
        allowed = mask.masked_fill(~allowed, torch.finfo(dtype).min)
    return allowed.unsqueeze(1)  # (R, 1, L, L)


def check_packing(model: Any, shares_media: bool = True) -> None:
    """Refuse a model that reads packed rows unlike single rows: check its parts, run a trial.

    Args:
        model: an AVLLM.
        shares_media: several questions share one copy of their clip.

    Raises:
        PackingError: names the part that cannot read packed rows, and the reason.
    """
    _check_connector(model.connector, shares_media)
    config = model.llm.config
    if config._attn_implementation not in MASKED:
        raise PackingError(
            f"data.pack is set with attention {config._attn_implementation!r}, which takes no mask "
            f"between rows; expected one of {', '.join(MASKED)} as model.llm.attention (a later "
            "stage has it from its init: llm.attention in config.json there). Or leave out "
            "data.pack",
            reason="attention",
        )
    layer_windows(config)
    try:
        difference, largest = _trial(model)
    except (ValueError, TypeError, RuntimeError) as error:
        raise PackingError(
            f"data.pack is set, but the LLM ({config.model_type}) takes no mask between rows "
            f"({error}). Leave out data.pack",
            reason="no_mask",
        ) from error
    exact = next(model.llm.parameters()).dtype == torch.float32
    tolerance = EXACT if exact else ROUNDED
    if difference > largest * tolerance:
        raise PackingError(
            f"data.pack is set, but the LLM ({config.model_type}) sees over the borders of packed "
            f"rows: its hidden states differ by {difference:.2g}, with {largest:.2g} as the "
            "largest number. Leave out data.pack",
            reason="sees_other_rows",
        )


def _check_connector(connector: Any, shares_media: bool) -> None:
    """Refuse a connector whose output in a packed row is not known before it runs."""
    conditioned = [type(a).__name__ for a in connector.adapters if a.conditioned]
    if conditioned and shares_media:
        raise PackingError(
            "data.pack puts several questions after one copy of their clip, but "
            f"{', '.join(conditioned)} in the connector makes another copy for each question. Take "
            "pack: sequences, or leave out data.pack",
            reason="conditioned",
        )
    if connector.by_content:
        raise PackingError(
            "data.pack is set, but content decides how many tokens the connector makes, so that "
            "positions in a packed row are not known beforehand. Leave out data.pack",
            reason="by_content",
        )


@torch.no_grad()
def _trial(model: Any) -> tuple[float, float]:
    """Compare the hidden states of two texts in a packed row with those in separate rows.

    Returns:
        the largest difference, and the largest number.
    """
    table = model.llm.get_input_embeddings()
    training = model.llm.training
    ids = torch.arange(1, 2 * PROBE + 1).remainder(table.num_embeddings).view(2, PROBE)
    rows = [text_row(x) for x in ids]
    model.llm.eval()
    states = []
    for batch_rows in (rows, fill_sequences(rows, 2 * PROBE)):
        batch = collate(batch_rows, pad_id=0).to(table.weight.device)
        hidden = model.run_decoder(table(batch.input_ids), batch).float()
        states.append(hidden.view(2 * PROBE, -1))
    model.llm.train(training)
    separate, packed = states
    return float((separate - packed).abs().max()), float(separate.abs().max())
