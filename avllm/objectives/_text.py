"""The text side of an alignment: one vector for each row's answer, by the frozen LLM or a frozen text encoder."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from avllm.data.collate import Batch


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """``(R, L, D)``, ``(R, L)`` bool -> ``(R, D)``: the mean where True, zero where nothing is."""
    weight = mask[..., None].to(x.dtype)
    return (x * weight).sum(1) / weight.sum(1).clamp(min=1)


def answer_tokens(labels: Tensor) -> tuple[Tensor, Tensor]:
    """The trained-on tokens of each row moved to the front: ids ``(R, M)`` (0 where none), mask ``(R, M)``, M >= 1."""
    real = labels >= 0
    count = real.sum(1)  # (R,)
    width = max(1, int(count.max()))
    mask = torch.arange(width, device=labels.device) < count[:, None]  # (R, M)
    ids = torch.zeros_like(mask, dtype=torch.long)
    ids[mask] = labels[real]
    return ids, mask


class TextSide(nn.Module):
    """Texts -> ``(R, dim)``, without gradients.

    Args:
        model: an AVLLM, whose LLM gives the width.
        kind: ``llm`` (mean of the LLM's last hidden states over the answer, without its LoRA adapters),
            ``llm_embeddings`` (mean of its input embeddings), or an HF text encoder's hub name or folder.
    """

    def __init__(self, model: Any, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.encoder: nn.Module | None = None
        self.dim = int(model.llm.get_input_embeddings().embedding_dim)
        if kind not in ("llm", "llm_embeddings"):
            from transformers import AutoModel, AutoTokenizer

            self.tokenizer = AutoTokenizer.from_pretrained(kind)
            encoder = AutoModel.from_pretrained(kind)
            self.encoder, self.dim = encoder.requires_grad_(False), int(encoder.config.hidden_size)

    @torch.no_grad()
    def forward(self, model: Any, batch: Batch, rows: Tensor | None = None) -> Tensor:
        """``(R, dim)``; a row without an answer gives a vector that nobody reads.

        Args:
            model, batch: as an objective gets them.
            rows: ``(R,)`` bool, those that are read; the others are spared the LLM and stay zero.
        """
        if rows is None:
            rows = torch.ones_like(batch.labels[:, 0], dtype=torch.bool)
        out = torch.zeros(len(rows), self.dim, device=batch.labels.device)
        if bool(rows.any()):
            out[rows] = self._embed(model, batch, rows).to(out.dtype)
        return out

    def _embed(self, model: Any, batch: Batch, rows: Tensor) -> Tensor:
        """``(n, dim)`` of the chosen rows."""
        if self.encoder is not None:
            return self._by_encoder([t for t, keep in zip(batch.targets, rows.tolist(), strict=True) if keep], rows)
        ids, mask = answer_tokens(batch.labels[rows])  # (n, M)
        if self.kind == "llm_embeddings":
            return masked_mean(model.llm.get_input_embeddings()(ids), mask)
        # a row without an answer still needs one visible token, or its softmax is empty
        seen = mask | (torch.arange(mask.shape[1], device=mask.device) == 0)
        with getattr(model.llm, "disable_adapter", nullcontext)() if _has_lora(model.llm) else nullcontext():
            out = model.llm(input_ids=ids, attention_mask=seen.long(), output_hidden_states=True, logits_to_keep=1)
        return masked_mean(out.hidden_states[-1], mask)  # (n, dim)

    def _by_encoder(self, targets: list[list[str]], rows: Tensor) -> Tensor:
        texts = [" ".join(row) for row in targets]
        tokens = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(rows.device)
        assert self.encoder is not None
        self.encoder.eval()
        return masked_mean(self.encoder(**tokens).last_hidden_state, tokens["attention_mask"].bool())


def _has_lora(llm: nn.Module) -> bool:
    return hasattr(llm, "peft_config")
