"""Who may look at whom in the LLM: padding, packed rows, windows that slide."""

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
EXACT, ROUNDED = 1e-4, 5e-2  # largest difference of the trial, as a share of the largest number: float32, below


class PackingError(UserError):
    """Packed rows would not be to this model, or to these objectives, what single rows are."""


def llm_inputs(config: Any, embeds: Tensor, batch: Batch) -> dict[str, Any]:
    """Keyword arguments of the LLM for embedded rows ``(R, L, D)``.

    Args:
        config: of the LLM.
    """
    packed = batch.segments is not None
    return {
        "inputs_embeds": embeds,
        "attention_mask": packed_mask(config, batch, embeds.dtype) if packed else batch.attention_mask.long(),
        "position_ids": batch.position_ids,
        "use_cache": False,
    }


def packed_mask(config: Any, batch: Batch, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
    """The mask ``(R, 1, L, L)`` of a packed batch; one for each kind where the LLM's layers are of two.

    Bool for SDPA, a quarter of the memory of float32, which the other implementation wants added. transformers takes
    masks of this form as they are, so that the window of sliding layers has to be in them.
    """
    assert batch.segments is not None
    kind = torch.bool if config._attn_implementation == "sdpa" else dtype
    masks = {
        layer: block_mask(batch.segments, kind, batch.position_ids, window)
        for layer, window in layer_windows(config).items()
    }
    return masks if len(masks) > 1 else next(iter(masks.values()))


def layer_windows(config: Any) -> dict[str, int | None]:
    """How far the layers of each kind look back, in tokens; None for all the way.

    Raises:
        PackingError: layers that no mask can keep from seeing other rows (recurrent ones), or of an unknown kind.
    """
    config = config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = sorted(set(getattr(config, "layer_types", None) or [SLIDING if window else FULL]))
    unknown = [kind for kind in kinds if kind not in (FULL, SLIDING)]
    if unknown:
        raise PackingError(
            f"data.pack is set, but the LLM ({config.model_type}) has layers of kind {', '.join(unknown)}, which no "
            "mask keeps from mixing the rows of a sequence; expected attention, full or sliding. Leave out data.pack"
        )
    return {kind: window if kind == SLIDING else None for kind in kinds}


def block_mask(
    segments: Tensor, dtype: torch.dtype, positions: Tensor | None = None, window: int | None = None
) -> Tensor:
    """Mask ``(R, 1, L, L)`` of packed rows: causal, in one group, to the own part or the shared one.

    Padding sees itself, so that no row of the softmax is empty.

    Args:
        segments: ``(R, L, 2)`` long (group, part), see :class:`avllm.data.collate.Batch`.
        dtype: bool (True = seen), or a float dtype for a mask that is added to the scores.
        positions: ``(R, L)`` long, wanted with ``window``: how many positions back are seen, itself included.
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
    """Make sure that packed rows are to a model what single rows are: by its parts, and by trying.

    Args:
        model: an AVLLM.
        shares_media: whether several questions share one copy of their clip.

    Raises:
        PackingError: what cannot be packed, and why.
    """
    config, kind = model.llm.config, model.llm.config.model_type
    conditioned = [type(a).__name__ for a in model.connector.adapters if a.conditioned]
    if conditioned and shares_media:
        raise PackingError(
            f"data.pack puts several questions after one copy of their clip, but {', '.join(conditioned)} in the "
            "connector makes another copy for each question. Take pack: sequences, or leave out data.pack"
        )
    if model.connector.by_content:
        raise PackingError(
            "data.pack is set, but content decides how many tokens the connector makes, so that positions in a packed "
            "row are not known beforehand. Leave out data.pack"
        )
    if config._attn_implementation not in MASKED:
        raise PackingError(
            f"data.pack is set with attention {config._attn_implementation!r}, which takes no mask between rows; "
            f"expected one of {', '.join(MASKED)} as model.llm.attention (a later stage has it from its init: "
            "llm.attention in config.json there). Or leave out data.pack"
        )
    layer_windows(config)
    try:
        apart, largest = _trial(model)
    except (ValueError, TypeError, RuntimeError) as error:
        raise PackingError(
            f"data.pack is set, but the LLM ({kind}) takes no mask between rows ({error}). Leave out data.pack"
        ) from error
    if apart > largest * (EXACT if next(model.llm.parameters()).dtype == torch.float32 else ROUNDED):
        raise PackingError(
            f"data.pack is set, but the LLM ({kind}) sees over the borders of packed rows: its hidden states differ by "
            f"{apart:.2g}, with {largest:.2g} as the largest number. Leave out data.pack"
        )


@torch.no_grad()
def _trial(model: Any) -> tuple[float, float]:
    """Largest difference between the hidden states of two texts packed and by themselves, and the largest number."""
    table, training = model.llm.get_input_embeddings(), model.llm.training
    ids = torch.arange(1, 2 * PROBE + 1).remainder(table.num_embeddings).view(2, PROBE)
    rows = [text_row(x) for x in ids]
    model.llm.eval()
    found = []
    for given in (rows, fill_sequences(rows, 2 * PROBE)):
        batch = collate(given, pad_id=0).to(table.weight.device)
        found.append(model.run_decoder(table(batch.input_ids), batch).float().view(2 * PROBE, -1))
    model.llm.train(training)
    return float((found[0] - found[1]).abs().max()), float(found[0].abs().max())
