"""Embed each part's answer as one vector, by the frozen LLM or a frozen text encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from avllm.errors import loading
from avllm.precision import at_least_float32

if TYPE_CHECKING:
    from avllm.data.collate import Batch


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of ``x (R, L, D)`` where ``mask (R, L)`` is True, else 0: ``(R, D)``."""
    weight = mask[..., None].to(x.dtype)
    return (x * weight).sum(1) / weight.sum(1).clamp(min=1)


def answer_tokens(batch: Batch, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return the answers' tokens of the n chosen parts.

    Args:
        batch: with its parts.
        chosen: bool, one a part of the batch.

    Returns:
        ids ``(n, M)``, 0 where there is none, and mask ``(n, M)``; M >= 1.
    """
    places, mask = batch.parts.trained.pick(chosen).padded()  # (n, M)
    return batch.input_ids.flatten()[places].masked_fill(~mask, 0), mask


class TextSide(nn.Module):
    """Embed texts as ``(n, dim)``, without gradients.

    Args:
        model: an AVLLM, whose LLM gives the width.
        kind: ``llm`` (mean of the LLM's last hidden states over the answer, without its LoRA
            adapters), ``llm_embeddings`` (mean of its input embeddings), or an HF text encoder's
            hub name or folder. Of models of two sides (CLIP, T5) the text side is taken.
    """

    def __init__(self, model: Any, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.dim = int(model.llm.get_input_embeddings().embedding_dim)
        # In a tuple it is no submodule: no rule can train it, no checkpoint holds it, and DDP does
        # not wait for it.
        self._frozen: tuple[nn.Module, ...] = ()
        if kind not in ("llm", "llm_embeddings"):
            from transformers import AutoTokenizer

            with loading("the text encoder", kind):
                self.tokenizer = AutoTokenizer.from_pretrained(kind, trust_remote_code=False)
                encoder, self.dim = load_text_encoder(kind)
            self._frozen = (encoder,)

    @torch.no_grad()
    def forward(self, model: Any, batch: Batch, chosen: Tensor | None = None) -> Tensor:
        """Embed the parts' answers, ``(n, dim)``; vectors of parts without an answer mean nothing.

        Args:
            model, batch: as an objective gets them.
            chosen: ``(n,)`` bool, the parts that are read; the others stay zero and cost nothing.
        """
        if chosen is None:
            chosen = torch.ones_like(batch.parts.row, dtype=torch.bool)
        if not bool(chosen.any()):
            return torch.zeros(len(chosen), self.dim, device=batch.labels.device)
        embedded = at_least_float32(self._embed(model, batch, chosen))  # (k, dim)
        out = embedded.new_zeros(len(chosen), self.dim)
        out[chosen] = embedded
        return out

    def _embed(self, model: Any, batch: Batch, chosen: Tensor) -> Tensor:
        """Embed the chosen parts, ``(k, dim)``."""
        if self._frozen:
            texts: list[str] = []
            for part, is_chosen in zip(batch.parts.items, chosen.tolist(), strict=True):
                if is_chosen:
                    texts.append(part.target)
            return self._by_encoder(texts, chosen.device)
        ids, mask = answer_tokens(batch, chosen)  # (k, M)
        if self.kind == "llm_embeddings":
            return masked_mean(model.llm.get_input_embeddings()(ids), mask)
        # a part without an answer still needs one visible token, or its softmax is empty
        seen = mask | (torch.arange(mask.shape[1], device=mask.device) == 0)
        with model.lora(()):
            hidden = model.hidden_states(ids, seen)  # (n, M, dim)
        return masked_mean(hidden, mask)  # (n, dim)

    def _by_encoder(self, texts: list[str], device: torch.device) -> Tensor:
        encoder = self._frozen[0].to(device)
        positions = getattr(encoder.config, "max_position_embeddings", 512)
        longest = min(self.tokenizer.model_max_length, positions)
        options = {
            "padding": True,
            "truncation": True,
            "max_length": longest,
            "return_tensors": "pt",
            "split_special_tokens": True,
        }
        tokens = self.tokenizer(texts, **options).to(device)
        return masked_mean(encoder(**tokens).last_hidden_state, tokens["attention_mask"].bool())


def load_text_encoder(name: str) -> tuple[nn.Module, int]:
    """Load a frozen text encoder by hub name or folder; return it, in eval mode, and its width.

    Raises:
        OSError: the name is neither a folder nor on the hub.
        ValueError: a model without a text side.
    """
    from transformers import AutoModel

    model = AutoModel.from_pretrained(name, trust_remote_code=False)
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    model = getattr(model, "text_model", model)
    if model.get_input_embeddings() is None or not hasattr(model.config, "vocab_size"):
        raise ValueError(
            f"text: {name} is a {type(model).__name__}, which reads no text; "
            "expected a text encoder"
        )
    return model.requires_grad_(False).eval(), int(model.config.hidden_size)
