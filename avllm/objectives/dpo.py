"""Optimise preferences directly (DPO: Rafailov et al. 2023, arXiv 2305.18290).

The policy is the model with its active LoRA sets. The reference is the model of the stage before:
its LoRA sets, which are kept frozen beside the new one, and its connector, of which a copy is kept
where the connector trains.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from avllm.errors import UserError
from avllm.objectives._ema import FrozenCopy
from avllm.objectives.base import Objective
from avllm.precision import at_least_float32

if TYPE_CHECKING:
    from avllm.data.collate import Batch
    from avllm.tokens import Tokens


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return the losses of pairs ``(n,)`` and their reward margins ``(n,)``.

    The margin is ``beta * ((chosen - reference_chosen) - (rejected - reference_rejected))``; the
    loss is ``-log sigmoid(margin)``. With ``label_smoothing`` e, a pair counts as turned round with
    probability e (conservative DPO, section 3 of Mitchell 2023, https://ericmitchell.ai/cdpo.pdf).

    Args:
        chosen, rejected: ``(n,)`` log-probabilities of whole answers by the policy.
        reference_chosen, reference_rejected: ``(n,)`` by the reference.
        beta: how far the policy may leave the reference; the smaller, the farther.
        label_smoothing: e, from 0 to below 0.5.
    """
    margins = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
    as_given = -(1 - label_smoothing) * F.logsigmoid(margins)
    turned_round = label_smoothing * F.logsigmoid(-margins)
    return as_given - turned_round, margins


def pairs_of(is_chosen: Tensor, is_rejected: Tensor) -> tuple[Tensor, Tensor]:
    """Return the places of the p rejected parts, and of the chosen part of each.

    The chosen part of a rejected one is the last before it.

    Args:
        is_chosen, is_rejected: ``(n,)`` bool over the parts of a batch, which keep the order of
            their rows.

    Returns:
        rejected and chosen places, ``(p,)`` each.

    Raises:
        ValueError: a rejected part without a chosen one before it.
    """
    chosen = is_chosen.nonzero().flatten()
    rejected = is_rejected.nonzero().flatten()
    number = is_chosen.cumsum(0)[rejected] - 1  # (p,) of the chosen part among the chosen
    if len(number) and int(number.min()) < 0:
        raise ValueError("a rejected answer has no chosen one before it")
    return rejected, chosen[number]


class DPO(Objective):
    """Raise the log-probability of chosen answers over rejected ones, against a frozen reference.

    Rows come from the row maker ``preference``; other parts are passed over.

    Args:
        model: an AVLLM.
        beta: strength of the tie to the reference.
        reference: LoRA sets of the stage before, which have to be frozen; none is the bare LLM. A
            stage adds its set as a copy: ``lora: {name: prefer, copy_of: default}``,
            ``trainable: [["lora_[AB].prefer", 1e-5], ...]``.
        label_smoothing: share of pairs that are expected to be turned round.
    """

    compares = False
    figures = ("accuracy", "margin", "chosen")

    def __init__(
        self,
        model: Any,
        *,
        beta: float = 0.1,
        reference: list[str] | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(model)
        if beta <= 0:
            raise ValueError(f"objectives: dpo: beta is {beta}; expected a number above 0")
        if not 0 <= label_smoothing < 0.5:
            raise ValueError(
                f"objectives: dpo: label_smoothing is {label_smoothing}; expected 0 to below 0.5"
            )
        sets = list(model.config.lora)
        if reference is None:
            reference = _sets_before(sets, model.config.active_lora)
        self.reference = tuple(reference)
        unknown = [name for name in self.reference if name not in sets]
        if unknown:
            raise ValueError(
                f"objectives: dpo: reference has LoRA set {unknown[0]!r}; expected some of {sets}"
            )
        if getattr(model, "fusion", None) is not None:
            raise ValueError(
                "objectives: dpo: a fusion trains beside the LLM, and no reference is kept of it"
            )
        self.beta = beta
        self.label_smoothing = label_smoothing
        self.plain_head = model.head_is_plain()
        self.checked = False
        self.connector = FrozenCopy({"connector": model.connector})

    def weight(self, batch: Batch) -> float:
        """Count the pairs."""
        return float(batch.parts.role_is("rejected").sum())

    def forward(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum the loss over pairs.

        Returns:
            the sum, and sums of ``accuracy`` (pairs in the right order), ``margin`` (of rewards),
            and the rewards ``chosen`` and ``rejected``, which are beta times the log-ratio of
            policy and reference.
        """
        rejected, chosen = pairs_of(batch.parts.role_is("chosen"), batch.parts.role_is("rejected"))
        live = model.media_tokens(batch)
        policy = self.log_probs(model, batch, live)  # (n,)
        reference = self.reference_log_probs(model, batch, live)  # (n,)
        losses, margins = dpo_loss(
            policy[chosen],
            policy[rejected],
            reference[chosen],
            reference[rejected],
            self.beta,
            self.label_smoothing,
        )
        rewards = self.beta * (policy - reference).detach()
        figures = {
            "accuracy": (margins > 0).float().sum(),
            "margin": margins.detach().sum(),
            "chosen": rewards[chosen].sum(),
            "rejected": rewards[rejected].sum(),
        }
        return losses.sum() + 0.0 * policy.sum(), figures

    @torch.no_grad()
    def reference_log_probs(self, model: Any, batch: Batch, live: dict[str, Tokens]) -> Tensor:
        """Return ``(n,)`` log-probabilities of the parts' answers by the model of the stage before.

        Raises:
            UserError: a set of the reference trains.
        """
        if not self.checked:
            self.check_frozen(model)
        streams = live
        if any(parameter.requires_grad for parameter in model.connector.parameters()):
            streams = model.media_tokens_by(batch, self.connector.weights("connector"))
        training = model.llm.training
        model.llm.eval()  # the LLM's dropout would make policy and reference differ by noise
        try:
            with model.lora(self.reference):
                return self.log_probs(model, batch, streams)
        finally:
            model.llm.train(training)

    def check_frozen(self, model: Any) -> None:
        """Make sure that nothing trains of which no reference is kept.

        Raises:
            UserError: something else than the connector and LoRA sets beside the reference trains.
        """
        for name, parameter in model.named_parameters():
            lora_set = _lora_set(name)
            kept = name.startswith("connector.") or lora_set not in (None, *self.reference)
            if parameter.requires_grad and not kept:
                raise UserError(
                    f"objectives: dpo: {name} trains, and no reference is kept of it; freeze it in "
                    "`trainable`, and train a copy of the LoRA set: "
                    "lora: {name: prefer, copy_of: default}"
                )
        self.checked = True

    def log_probs(self, model: Any, batch: Batch, streams: dict[str, Tokens]) -> Tensor:
        """Return the log-probability of each part's answer by the active LoRA sets, ``(n,)``."""
        embeds = model.merge_media(batch.input_ids, streams, batch)  # (R, L, D)
        trained = batch.parts.trained
        # The place before each trained token, (k,) in R * L; an answer is never first in its row.
        before = trained.at - 1
        if self.plain_head:
            hidden = model.run_decoder(embeds, batch).flatten(0, 1)  # (R * L, D)
            logits = model.llm.get_output_embeddings()(hidden[before])  # (k, V)
        else:
            logits = model.run_llm(embeds, batch).logits.flatten(0, 1)[before]  # (k, V)
        tokens = batch.input_ids.flatten()[trained.at]  # (k,)
        by_token = -F.cross_entropy(at_least_float32(logits), tokens, reduction="none")  # (k,)
        return by_token.new_zeros(trained.count).index_add(0, trained.owner, by_token)


def _lora_set(parameter: str) -> str | None:
    """Return the LoRA set of a parameter, ``...lora_A.NAME.weight``; None for others."""
    match = re.search(r"\.(?:lora|ia3|hada|lokr|vera)_\w+\.([^.]+)", parameter)
    return match[1] if match else None


def _sets_before(sets: list[str], active: list[str]) -> list[str]:
    """Return the LoRA sets of the stage before, where there can be no doubt.

    Raises:
        ValueError: several sets, or none, lie beside those that are active now.
    """
    frozen = [name for name in sets if name not in active]
    if len(frozen) > 1 or (sets and not frozen):
        raise ValueError(
            f"objectives: dpo: reference is not given, and the LoRA sets {sets} (active: {active}) "
            "leave open which ones the stage before used; give reference: [NAME, ...], or [] for "
            "the bare LLM"
        )
    return frozen
