"""Next-token cross-entropy on the tokens that a row trains on: captioning and instructions alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from avllm.objectives.base import Objective

if TYPE_CHECKING:
    from avllm.data.collate import Batch

IGNORE = -100


def targets(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Where the targets are predicted from, and what they are.

    Args:
        labels: ``(R, L)`` long, -100 = not trained on.

    Returns:
        ``(R, L)`` bool, True at the place **before** each target, and ``(n,)`` the targets, row by row.
    """
    at = torch.zeros_like(labels, dtype=torch.bool)
    at[:, :-1] = labels[:, 1:] != IGNORE
    return at, labels[:, 1:][labels[:, 1:] != IGNORE]


def next_token_loss(logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy summed over targets, and how many of them are the likeliest token.

    Args:
        logits: ``(n, V)`` at the places that :func:`targets` gives; wanted: ``(n,)``.

    Returns:
        two float32 scalars; zero (still on the graph of ``logits``) when n is 0.
    """
    loss = F.cross_entropy(logits.float(), wanted, reduction="sum")
    with torch.no_grad():
        hits = (logits.argmax(-1) == wanted).float().sum() if len(wanted) else loss.new_zeros(())
    return loss, hits


def head_is_plain(llm: Any) -> bool:
    """Whether the LLM's logits are its head applied to its last hidden states, with nothing before or behind it.

    Soft caps and scales (Gemma 2, Cohere, ...) are found by trying rather than by a list of architectures: the head is
    made to answer a ramp of large numbers, which has to come out as it is.
    """
    head, training, taken = llm.get_output_embeddings(), llm.training, []

    def answer_a_ramp(_: Any, inputs: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        taken.append(inputs[0])
        return torch.linspace(-100, 100, logits.shape[-1], device=logits.device, dtype=logits.dtype).expand_as(logits)

    handle = head.register_forward_hook(answer_a_ramp)
    llm.eval()
    with torch.no_grad():
        ids = torch.tensor([[1, 2]], device=llm.get_input_embeddings().weight.device)
        logits = llm(input_ids=ids, use_cache=False).logits
        hidden = llm.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    handle.remove()
    llm.train(training)
    ramp = torch.linspace(-100, 100, logits.shape[-1], device=logits.device, dtype=logits.dtype)
    return len(taken) == 1 and torch.allclose(taken[0], hidden) and torch.allclose(logits, ramp.expand_as(logits))


class NextToken(Objective):
    """Cross-entropy of each target given what stands before it; its weight is the number of targets."""

    compares = False

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.plain_head = head_is_plain(model.llm)

    def weight(self, batch: Batch) -> float:
        """Target tokens that have a predecessor."""
        return float(batch.num_targets)

    def forward(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Summed cross-entropy, and ``hits``: targets that were the likeliest token.

        Only the hidden states at targets go through the LLM's head, so that ``(R, L, V)`` never exists; where the LLM
        does more to its logits than its head, all of them are made.
        """
        at, wanted = targets(batch.labels)  # (R, L), (n,)
        embeds = model.embed(batch)  # (R, L, D)
        if self.plain_head:
            logits = model.llm.get_output_embeddings()(model.run_decoder(embeds, batch)[at])  # (n, V)
        else:
            logits = model.run_llm(embeds, batch).logits[at]  # (n, V)
        loss, hits = next_token_loss(logits, wanted)
        return loss, {"hits": hits}
